// The direct algorithm of the convolution engine: what one thread does with a block of output pixels.
#include "ops/conv_bn_act/conv_cut_cpu.h"
#include "ops/conv_bn_act/conv_depthwise_cpu.h"
#include "ops/conv_bn_act/conv_narrow_cpu.h"

namespace dl4ds {
namespace {

/// Rows [first, end) of the output: what they read and write.
void add_next_block(Ahead& ahead, const ConvArgs& args, int64_t first, int64_t end) {
    const ConvShape& s = args.shape;
    if (args.prologue != nullptr) {
        ConvShape read = s;  // pooling reads as a kernel of its size does
        read.kernel_h = read.kernel_w = read.stride_h = read.stride_w = args.prologue->pool;
        read.height *= args.prologue->pool, read.width *= args.prologue->pool;
        for (int64_t i = 0; i < args.prologue->count; ++i) {
            const ConvSource& in = args.prologue->sources[i];
            add_input(ahead, {in.x, in.stride_n, in.stride_h, in.stride_w, in.channels}, read, first,
                      end - 1);
        }
    } else {
        add_input(ahead, {args.x, args.stride_n, args.stride_h, args.stride_w, s.channels}, s, first,
                  end - 1);
    }
    if (args.epilogue.residual != nullptr) {
        ahead.add(args.epilogue.residual + first * s.channels_out,
                  args.epilogue.residual + end * s.channels_out);
    }
    ahead.add(args.out + first * s.channels_out, args.out + end * s.channels_out);
}

void run_direct(const ConvArgs& args) {
    const ConvKernels& kernels = conv_kernels();
    const ConvShape& s = args.shape;
    const int64_t width = kernels.panel, outputs = s.group_channels_out(), k = s.group_channels() * s.taps();
    const int64_t line = chunks_of(k) * kChunk, panel_floats = k * width, panels = ceil_div(outputs, width);
    const int64_t budget = cache_sizes().l2_bytes / 2 / 4;
    const int64_t wanted = std::clamp<int64_t>(budget / line, kernels.max_rows, 8 * kernels.max_rows);
    const Cut cut =
        make_cut(s.n * s.out_height() * s.out_width(), panels, wanted, kernels.max_rows, args.threads);
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
            const float* b = args.packed + (group * panels + cut.panel(share)) * panel_floats;
            for (int64_t p = cut.panel(share); p < cut.panel(share + 1); ++p, b += panel_floats) {
                const int64_t channel = group * outputs + p * width;
                GemmFinish finish = finish_at(args, channel, std::min(width, outputs - p * width));
                for (int64_t g = 0; g < groups.count; ++g) {
                    const int64_t at = (first + groups.begin(g)) * s.channels_out + channel;
                    // The first groups ask for the next panel, each for one part of it; the others for the
                    // next block.
                    const char* ahead = g * 16 < width
                                            ? reinterpret_cast<const char*>(b + panel_floats + g * k * 16)
                                            : next.take(k * 64, reinterpret_cast<const char*>(b));
                    finish.residual = args.epilogue.residual ? args.epilogue.residual + at : nullptr;
                    kernels.gemm_finish[groups.height(g)](
                        {a + groups.begin(g) * line, b, k, args.out + at, s.channels_out, ahead}, finish);
                }
            }
        });
}

}  // namespace

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
