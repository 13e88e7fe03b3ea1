// Building blocks of instruction handlers: apply a scalar operation to the lanes of a warp.
#pragma once
#include <type_traits>

#include "decoder.h"
#include "launch.h"

namespace ptxsim {

template <class T>
inline void store_lanes(Warp& w, u32 slot, const T* values, Mask mask) {
    T* out = w.reg<T>(slot);
    if (mask == kAllLanes) {
        for (int l = 0; l < kLanes; l++) out[l] = values[l];
    } else {
        for (int l = 0; l < kLanes; l++)
            if (mask >> l & 1) out[l] = values[l];
    }
}

// Op is a stateless function object; all lanes are computed (the loop vectorises), the masked ones are
// stored.
template <class Op, class D, class A>
void unary(Warp& w, const Instruction& in, Mask mask) {
    D out[kLanes];
    const A* a = w.reg<A>(in.a);
    for (int l = 0; l < kLanes; l++) out[l] = static_cast<D>(Op()(a[l]));
    store_lanes(w, in.d, out, mask);
}
template <class Op, class D, class A, class B = A>
void binary(Warp& w, const Instruction& in, Mask mask) {
    D out[kLanes];
    const A* a = w.reg<A>(in.a);
    const B* b = w.reg<B>(in.b);
    for (int l = 0; l < kLanes; l++) out[l] = static_cast<D>(Op()(a[l], b[l]));
    store_lanes(w, in.d, out, mask);
}
template <class Op, class D, class A, class B = A, class C = A>
void ternary(Warp& w, const Instruction& in, Mask mask) {
    D out[kLanes];
    const A* a = w.reg<A>(in.a);
    const B* b = w.reg<B>(in.b);
    const C* c = w.reg<C>(in.c);
    for (int l = 0; l < kLanes; l++) out[l] = static_cast<D>(Op()(a[l], b[l], c[l]));
    store_lanes(w, in.d, out, mask);
}
// The same with the instruction at hand (immediates, modes): Op()(in, a, b, c).
template <class Op, class D, class A, class B = A, class C = A>
void with_mode(Warp& w, const Instruction& in, Mask mask) {
    D out[kLanes];
    const A* a = w.reg<A>(in.a);
    const B* b = w.reg<B>(in.b);
    const C* c = w.reg<C>(in.c);
    for (int l = 0; l < kLanes; l++) out[l] = mask >> l & 1 ? Op()(in, a[l], b[l], c[l]) : D();
    store_lanes(w, in.d, out, mask);
}

// Chooses a template by a run-time type: f(Tag<T>) returns the handler.
template <class T>
struct Tag {
    using type = T;
};
template <class F>
Handler for_integer(Type t, F f) {
    switch (t) {
        case Type::B16:
        case Type::U16:
            return f(Tag<u16>());
        case Type::S16:
            return f(Tag<i16>());
        case Type::B32:
        case Type::U32:
            return f(Tag<u32>());
        case Type::S32:
            return f(Tag<i32>());
        case Type::B64:
        case Type::U64:
            return f(Tag<u64>());
        case Type::S64:
            return f(Tag<i64>());
        default:
            return nullptr;
    }
}
template <class F>
Handler for_width(Type t, F f) {
    switch (bytes_of(t)) {
        case 1:
            return f(Tag<u8>());
        case 2:
            return f(Tag<u16>());
        case 4:
            return f(Tag<u32>());
        case 8:
            return f(Tag<u64>());
        default:
            return nullptr;
    }
}
#define PTXSIM_TYPE(tag) typename decltype(tag)::type

}  // namespace ptxsim
