// conv_chain: several convolution steps in one call of an op. Between two steps of a network the host's work
// (Python, the dispatcher, argument checks, all with caches that the convolution just emptied) takes as long
// as a small layer; here it is paid once for a block. What the ints of `code` mean is in
// dl4ds_kernels/modules/_chain.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "ops/conv_bn_act/conv_step_cpu.h"

namespace dl4ds {
namespace {

constexpr const char* kOp = "conv_chain";

constexpr int64_t kJoin = -1;  // in place of an algorithm: the step joins its sources

/// The ints of one step, in this order, followed by `sources` register numbers.
struct Code {
    int64_t algorithm;
    int64_t weight, packed, bias;  // places in `tensors`, -1: absent
    int64_t after[4], before[4];   // running_mean, running_var, weight, bias
    int64_t residual;              // a register, -1: none
    int64_t stride[2], padding[2], dilation[2], groups;
    int64_t after_eps_std, after_activation;
    int64_t has_before, before_eps_std, before_activation;
    int64_t pool;
    int64_t sources;
};
constexpr size_t kCodeInts = sizeof(Code) / sizeof(int64_t);
constexpr size_t kNumbers = 3;  // of a step: eps after, negative slope, eps before

/// The steps of a program and which of them is the last to read a register.
struct Program {
    Program(const std::vector<Tensor>& inputs, const std::vector<int64_t>& code)
        : inputs_(static_cast<int64_t>(inputs.size())) {
        for (size_t at = 0; at < code.size();) {
            DL4DS_CHECK(code.size() - at >= kCodeInts, kOp, ": code: expected whole steps");
            Code step;
            std::memcpy(&step, code.data() + at, sizeof step);
            at += kCodeInts;
            DL4DS_CHECK(step.sources >= 1 && static_cast<size_t>(step.sources) <= code.size() - at, kOp,
                        ": code: expected the source registers of step ", steps.size());
            steps.push_back(step);
            sources.push_back(code.data() + at);
            at += static_cast<size_t>(step.sources);
        }
        DL4DS_CHECK(!steps.empty(), kOp, ": code: expected at least one step");
        last_reader.assign(inputs.size() + steps.size(), -1);
        for (size_t i = 0; i < steps.size(); ++i) {
            const int64_t known = inputs_ + static_cast<int64_t>(i);
            const auto note = [&](int64_t index) {
                DL4DS_CHECK(index >= 0 && index < known, kOp, ": code: step ", i, " reads register ", index,
                            " of ", known);
                last_reader[static_cast<size_t>(index)] = static_cast<int64_t>(i);
            };
            for (int64_t k = 0; k < steps[i].sources; ++k) {
                note(sources[i][k]);
            }
            if (steps[i].residual >= 0) {
                note(steps[i].residual);
            }
        }
    }

    bool is_input(int64_t index) const { return index < inputs_; }

    std::vector<Code> steps;
    std::vector<const int64_t*> sources;
    std::vector<int64_t> last_reader;

  private:
    int64_t inputs_;
};

}  // namespace

Tensor conv_chain(std::vector<Tensor> inputs, std::vector<Tensor> tensors, std::vector<int64_t> code,
                  std::vector<double> numbers) {
    const Program program(inputs, code);
    DL4DS_CHECK(numbers.size() == kNumbers * program.steps.size(), kOp, ": numbers: expected ", kNumbers,
                " a step, got ", numbers.size());
    std::vector<std::optional<Tensor>> registers;
    for (const Tensor& x : inputs) {  // once, not in every step that reads it
        const TensorInfo xi = tensor_info(x);
        registers.emplace_back(xi.dim == 4 ? as_channels_last(x, xi) : x);
    }
    const auto tensor = [&](int64_t at) -> std::optional<Tensor> {
        DL4DS_CHECK(at < static_cast<int64_t>(tensors.size()), kOp, ": code: tensor ", at, " of ",
                    tensors.size());
        return at < 0 ? std::nullopt : std::optional<Tensor>(tensors[static_cast<size_t>(at)]);
    };
    const auto vectors = [&](const int64_t (&at)[4], double eps, int64_t eps_std, int64_t act, double slope) {
        return bn_vectors(kOp, tensor(at[0]), tensor(at[1]), tensor(at[2]), tensor(at[3]), eps, eps_std != 0,
                          act, slope);
    };
    const auto run = [&](size_t i) {
        const Code& c = program.steps[i];
        const double* number = numbers.data() + kNumbers * i;
        ConvStep step{};
        for (int64_t k = 0; k < c.sources; ++k) {
            step.xs.push_back(*registers[static_cast<size_t>(program.sources[i][k])]);
        }
        if (c.algorithm == kJoin) {
            registers.emplace_back(join_channels(step.xs));
        } else {
            step.algorithm =
                c.algorithm == 0 ? ConvAlgorithm::kLibrary : conv_algorithm_from_code(c.algorithm);
            DL4DS_CHECK(c.weight >= 0 && c.packed >= 0, kOp, ": code: step ", i, " has no weight");
            step.weight = *tensor(c.weight), step.packed = *tensor(c.packed), step.bias = tensor(c.bias);
            step.conv = {{c.stride[0], c.stride[1]},
                         {c.padding[0], c.padding[1]},
                         {c.dilation[0], c.dilation[1]},
                         c.groups};
            step.after = vectors(c.after, number[0], c.after_eps_std, c.after_activation, number[1]);
            if (c.has_before != 0) {
                step.before = vectors(c.before, number[2], c.before_eps_std, c.before_activation, 0.0);
                step.pool = c.pool;
            }
            if (c.residual >= 0) {
                step.residual = registers[static_cast<size_t>(c.residual)];
                step.residual_is_dead =
                    !program.is_input(c.residual) &&
                    program.last_reader[static_cast<size_t>(c.residual)] == static_cast<int64_t>(i) &&
                    std::find(program.sources[i], program.sources[i] + c.sources, c.residual) ==
                        program.sources[i] + c.sources;
            }
            registers.emplace_back(run_conv_step(step));
        }
        const auto release = [&](int64_t r) {
            if (program.last_reader[static_cast<size_t>(r)] == static_cast<int64_t>(i)) {
                registers[static_cast<size_t>(r)].reset();  // its memory goes to the next step
            }
        };
        std::for_each(program.sources[i], program.sources[i] + c.sources, release);
        if (c.residual >= 0) {
            release(c.residual);
        }
    };
    const auto run_all = [&] {
        for (size_t i = 0; i < program.steps.size(); ++i) {
            run(i);
        }
    };
    // The library's primitive brings its own parallel region, which would be serial inside a team's.
    const bool library = std::any_of(program.steps.begin(), program.steps.end(),
                                     [](const Code& c) { return c.algorithm == 0; });
    with_team(library ? 1 : num_threads(), run_all);
    return *registers.back();
}

STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, CPU, m) { m.impl("conv_chain", TORCH_BOX(&conv_chain)); }

// A step on the library's primitive brings a weight that oneDNN packed.
STABLE_TORCH_LIBRARY_IMPL(dl4ds_kernels, MkldnnCPU, m) { m.impl("conv_chain", TORCH_BOX(&conv_chain)); }

}  // namespace dl4ds
