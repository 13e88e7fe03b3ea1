// What a tree of nn.Modules looks like to a forward that was recorded: every module's type, its __dict__
// (mode, geometry, patched forward, packed weights) and what has a say of the dictionaries in it (parameters,
// buffers, hooks, submodules), down to the leaves, as the addresses of all these objects. Comparing thousands
// of addresses takes microseconds, where the same questions asked in Python cost as much as a small layer.
//
// Only addresses are kept. A comparison walks the living tree from its root and stops at the first
// difference, so it never follows a stale address. That a new object may lie where a freed one lay is the
// caller's concern: `keep` gets the values whose content matters (numbers, tuples, a patched forward) to hold
// on to.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace dl4ds {

namespace snapshot_detail {

constexpr int kDeepest = 64;  // modules inside one another; more, or a cycle, is no tree to take a picture of

/// The dictionaries of a module that have a say in a forward without gradients (no hooks of backward or of
/// state_dict). Attribute names are interned: a name is its address.
struct Names {
    PyObject* forward = PyUnicode_InternFromString("forward");
    PyObject* modules = PyUnicode_InternFromString("_modules");
    PyObject* others[4] = {PyUnicode_InternFromString("_parameters"), PyUnicode_InternFromString("_buffers"),
                           PyUnicode_InternFromString("_forward_hooks"),
                           PyUnicode_InternFromString("_forward_pre_hooks")};

    bool has(PyObject* key) const {
        return key == modules || key == others[0] || key == others[1] || key == others[2] || key == others[3];
    }
};

/// Made at the first call, under the GIL; without a guard (see kShim in common/shim.h).
inline const Names& names() {
    static const Names* interned = nullptr;
    if (interned == nullptr) {
        interned = new Names;
    }
    return *interned;
}

/// Visits the entries of a dictionary. The visitors return false to stop.
template <class Visitor>
bool walk_dict(PyObject* dict, Visitor& visit) {
    Py_ssize_t at = 0;
    PyObject *key = nullptr, *value = nullptr;
    if (!visit.dict(dict)) {
        return false;
    }
    while (PyDict_Next(dict, &at, &key, &value)) {
        if (!visit.name(key) || !visit.value(key, value)) {
            return false;
        }
    }
    return true;
}

template <class Visitor>
bool walk_module(PyObject* module, Visitor& visit, int depth) {
    const auto dict = pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(module, nullptr));
    if (!dict) {
        PyErr_Clear();
        return false;
    }
    if (depth > kDeepest || !visit.module(module) || !visit.dict(dict.ptr())) {
        return false;
    }
    PyObject* children = nullptr;
    Py_ssize_t at = 0;
    PyObject *key = nullptr, *value = nullptr;
    while (PyDict_Next(dict.ptr(), &at, &key,
                       &value)) {  // as many attributes of the same values: the same names
        if (!visit.value(key, value)) {
            return false;
        }
        if (names().has(key)) {  // before the value's type is looked at, which is somewhere else in memory
            if (!PyDict_Check(value) || !walk_dict(value, visit)) {
                return false;
            }
            children = key == names().modules ? value : children;
        }
    }
    for (at = 0; children != nullptr && PyDict_Next(children, &at, &key, &value);) {
        if (value != Py_None && !walk_module(value, visit, depth + 1)) {
            return false;
        }
    }
    return true;
}

/// Writes the addresses down.
struct Writer {
    std::vector<uintptr_t> words;
    pybind11::list keep;

    bool put(const void* address) {
        words.push_back(reinterpret_cast<uintptr_t>(address));
        return true;
    }
    bool module(PyObject* m) { return put(Py_TYPE(m)); }
    bool dict(PyObject* d) {
        words.push_back(static_cast<uintptr_t>(PyDict_Size(d)));
        return put(d);
    }
    bool name(PyObject* key) { return put(key); }
    bool value(PyObject* key, PyObject* value) {
        if (PyTuple_CheckExact(value) || PyFloat_CheckExact(value) || PyLong_CheckExact(value) ||
            PyUnicode_CheckExact(value) || key == names().forward) {
            keep.append(pybind11::reinterpret_borrow<pybind11::object>(value));
        }
        return put(value);
    }
};

/// Compares them.
struct Reader {
    const char* next;
    const char* end;

    bool is(const void* address) { return is(reinterpret_cast<uintptr_t>(address)); }
    bool is(uintptr_t word) {
        uintptr_t expected = 0;
        if (next == end) {
            return false;
        }
        std::memcpy(&expected, next, sizeof expected);
        next += sizeof expected;
        return expected == word;
    }
    bool module(PyObject* m) { return is(Py_TYPE(m)); }
    bool dict(PyObject* d) { return is(static_cast<uintptr_t>(PyDict_Size(d))) && is(d); }
    bool name(PyObject* key) { return is(key); }
    bool value(PyObject*, PyObject* value) { return is(value); }
};

/// Collects the cache lines that a Reader will touch.
struct Lines {
    std::vector<uintptr_t> words;

    void add(const void* from, int count) {
        for (int i = 0; i < count && from != nullptr; ++i) {
            words.push_back(reinterpret_cast<uintptr_t>(from) + 64 * static_cast<uintptr_t>(i));
        }
    }
    bool module(PyObject* m) {
        add(m, 1);
        return true;
    }
    bool dict(PyObject* d) {
        const auto* object = reinterpret_cast<const PyDictObject*>(d);
        add(d, 1);
        const auto size = static_cast<int>(PyDict_Size(d));
        if (size > 0) {
            add(object->ma_keys, 2 + size * 3 / 8);  // an entry has up to 24 bytes
            add(object->ma_values, 1 + size / 8);
        }
        return true;
    }
    bool name(PyObject*) { return true; }
    bool value(PyObject*, PyObject*) { return true; }
};

inline pybind11::bytes bytes_of(const std::vector<uintptr_t>& words) {
    return {reinterpret_cast<const char*>(words.data()), words.size() * sizeof(uintptr_t)};
}

}  // namespace snapshot_detail

/// (the tree's addresses, the cache lines that a comparison reads); empty where there is no tree. `keep` is a
/// list that gets the values to hold on to.
inline pybind11::tuple module_snapshot(const pybind11::object& module, pybind11::list keep) {
    snapshot_detail::Writer writer{{}, std::move(keep)};
    snapshot_detail::Lines lines;
    if (!snapshot_detail::walk_module(module.ptr(), writer, 0)) {
        writer.words.clear();
    }
    snapshot_detail::walk_module(module.ptr(), lines, 0);
    return pybind11::make_tuple(snapshot_detail::bytes_of(writer.words),
                                snapshot_detail::bytes_of(lines.words));
}

/// Whether the module's tree still is what the snapshot saw.
inline bool module_unchanged(const pybind11::object& module, const pybind11::bytes& snapshot) {
    const std::string_view words = snapshot;
    snapshot_detail::Reader reader{words.data(), words.data() + words.size()};
    return !words.empty() && snapshot_detail::walk_module(module.ptr(), reader, 0) &&
           reader.next == reader.end;
}

/// Asks for cache lines, all at once: a convolution leaves none of Python's objects in the caches, and a walk
/// through them would wait for one after the other. Any address will do; nothing is read.
inline void prefetch_lines(const pybind11::bytes& lines) {
    const std::string_view words = lines;
    for (size_t i = 0; i + sizeof(uintptr_t) <= words.size(); i += sizeof(uintptr_t)) {
        uintptr_t line = 0;
        std::memcpy(&line, words.data() + i, sizeof line);
        __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
    }
}

}  // namespace dl4ds
