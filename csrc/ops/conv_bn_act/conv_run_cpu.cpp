// The direct algorithm of the convolution engine: what one thread does with a block of output pixels.
#include <limits>

#include "ops/conv_bn_act/conv_cut_cpu.h"
#include "ops/conv_bn_act/conv_depthwise_cpu.h"
#include "ops/conv_bn_act/conv_narrow_cpu.h"

namespace dl4ds {
namespace {

/// Rows [first, end) of the output: what they read and write.
void add_next_block(Ahead& ahead, const ConvArgs& args, int64_t first, int64_t end) {
    const ConvShape& s = args.shape;
    if (args.prologue != nullptr) {
        add_sources(ahead, *args.prologue, s, first, end - 1);
    } else {
        add_input(ahead, {args.x, args.stride_n, args.stride_h, args.stride_w, s.channels}, s, first,
                  end - 1);
    }
    if (args.back != nullptr) {
        return;  // its kernel asks for what it reads and writes, rows far apart
    }
    if (args.epilogue.residual != nullptr) {
        ahead.add(args.epilogue.residual + first * s.channels_out,
                  args.epilogue.residual + end * s.channels_out);
    }
    ahead.add(args.out + first * s.channels_out, args.out + end * s.channels_out);
}

Cut cut_of(const ConvShape& s, int64_t threads, bool fixed) {
    const ConvKernels& kernels = conv_kernels();
    const int64_t line = chunks_of(s.group_channels() * s.taps()) * kChunk;
    const int64_t budget = fixed ? 1 << 16 : cache_sizes().l2_bytes / 2 / 4;
    const int64_t wanted = std::clamp<int64_t>(budget / line, kernels.max_rows, 8 * kernels.max_rows);
    return (fixed ? make_fixed_cut : make_cut)(s.n * s.out_height() * s.out_width(),
                                               ceil_div(s.group_channels_out(), kernels.panel), wanted,
                                               kernels.max_rows, threads);
}

/// The part of ConvBnBack for the rows from `row` on and the panel from `channel` on.
GemmBack back_at(const ConvBnBack& back, int64_t row, int64_t channel, int64_t columns, float* sums,
                 int64_t padded) {
    constexpr float kNever = std::numeric_limits<float>::quiet_NaN();
    return {back.x + row * back.x_pitch + channel,
            back.grad + row * back.grad_pitch + channel,
            back.x_pitch,
            back.grad_pitch,
            back.mean + channel,
            back.scale + channel,
            back.shift + channel,
            back.activation == Activation::kNone ? kNever : 0.0f,
            back.activation == Activation::kRelu6 ? 6.0f : kNever,
            sums + channel,
            sums + padded + channel,
            columns};
}

void run_direct(const ConvArgs& args) {
    const ConvKernels& kernels = conv_kernels();
    const ConvShape& s = args.shape;
    const int64_t width = kernels.panel, outputs = s.group_channels_out(), k = s.group_channels() * s.taps();
    const int64_t line = chunks_of(k) * kChunk, panel_floats = k * width, panels = ceil_div(outputs, width);
    const Cut cut = cut_of(s, args.threads, args.back != nullptr);
    const int64_t scratch_floats = (cut.block + 1) * line + 2 * kSkew;  // copy_over writes a vector too far
    const int64_t workers = workers_for(s.groups * cut.items(), args.threads);
    Scratch scratch(workers * scratch_floats * 4);
    for_each_item(
        s.groups * cut.items(), workers, scratch.as<float>(), scratch_floats, [&](int64_t item, float* a) {
            const int64_t group = item / cut.items(), block = item % cut.items() / cut.shares,
                          share = item % cut.shares;
            const int64_t first = cut.row(block);
            const Groups groups(cut.row(block + 1) - first, kernels.max_rows);
            PackArgs pack{args.x + group * s.group_channels(),
                          args.stride_n,
                          args.stride_h,
                          args.stride_w,
                          &s,
                          0,
                          0,
                          nullptr,
                          a + cut.block * line};
            for (int64_t g = 0; g < groups.count; ++g) {
                pack.first = first + groups.begin(g);
                pack.rows = groups.height(g);
                pack.a = a + groups.begin(g) * line;
                if (args.prologue != nullptr) {
                    kernels.pack_sources({args.prologue, &s, pack.first, pack.rows, pack.a});
                } else {
                    kernels.pack(pack);
                }
            }
            Ahead next;
            if (block + 1 < cut.blocks && cut.shares == 1) {
                add_next_block(next, args, cut.row(block + 1), cut.row(block + 2));
            }
            float* sums = nullptr;  // of the block
            if (args.back != nullptr) {
                sums = args.back->sums + block * 2 * panels * width;
                const int64_t from = cut.panel(share) * width, to = cut.panel(share + 1) * width;
                std::fill(sums + from, sums + to, 0.0f);
                std::fill(sums + panels * width + from, sums + panels * width + to, 0.0f);
            }
            const float* b = args.packed + (group * panels + cut.panel(share)) * panel_floats;
            for (int64_t p = cut.panel(share); p < cut.panel(share + 1); ++p, b += panel_floats) {
                const int64_t channel = group * outputs + p * width;
                const int64_t columns = std::min(width, outputs - p * width);
                GemmFinish finish{};
                if (args.back == nullptr) {
                    finish = finish_at(args, channel, columns);
                }
                for (int64_t g = 0; g < groups.count; ++g) {
                    const int64_t at = (first + groups.begin(g)) * s.channels_out + channel;
                    // The first groups ask for the next panel, each for one part of it; the others for the
                    // next block.
                    const char* ahead = g * 16 < width
                                            ? reinterpret_cast<const char*>(b + panel_floats + g * k * 16)
                                            : next.take(k * 64, reinterpret_cast<const char*>(b));
                    if (args.back != nullptr) {
                        const int64_t row = first + groups.begin(g);
                        kernels.gemm_back[groups.height(g)](
                            {a + groups.begin(g) * line, b, k,
                             args.out + row * args.back->out_pitch + channel, args.back->out_pitch, ahead},
                            back_at(*args.back, row, channel, columns, sums, panels * width));
                        continue;
                    }
                    finish.residual = args.epilogue.residual ? args.epilogue.residual + at : nullptr;
                    kernels.gemm_finish[groups.height(g)](
                        {a + groups.begin(g) * line, b, k, args.out + at, s.channels_out, ahead}, finish);
                }
            }
        });
}

}  // namespace

int64_t conv_back_blocks(const ConvShape& shape) { return cut_of(shape, 1, true).blocks; }

bool conv_run(ConvAlgorithm algorithm, const ConvArgs& args) {
    if (algorithm == ConvAlgorithm::kDirect) {
        run_direct(args);
        return true;
    }
    if (algorithm == ConvAlgorithm::kDepthwise) {
        depthwise_run(args);
        return true;
    }
    if (algorithm == ConvAlgorithm::kNarrow) {
        narrow_run(args);
        return true;
    }
    return conv_run_transformed(algorithm, args);
}

}  // namespace dl4ds
