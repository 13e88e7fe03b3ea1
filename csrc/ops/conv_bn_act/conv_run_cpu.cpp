// The loops of the convolution engine: how the work is cut into blocks, and what one thread does with a
// block. The cut never changes a result (see conv_engine_cpu.h), so blocks are handed out as threads ask for
// them.
#include <algorithm>
#include <atomic>

#include "common/cpu/isa.h"
#include "common/cpu/output.h"
#include "common/cpu/parallel.h"
#include "ops/conv_bn_act/conv_ahead_cpu.h"
#include "ops/conv_bn_act/conv_engine_cpu.h"

namespace dl4ds {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Rows (pixels or tiles) by panels of output channels; an item is one block of rows and a share of the
/// panels.
struct Cut {
    int64_t rows, block;  // all rows, rows of a block at most
    int64_t panels;
    int64_t blocks, shares;

    int64_t items() const { return blocks * shares; }
    int64_t row(int64_t b) const { return rows * b / blocks; }
    int64_t panel(int64_t s) const { return panels * s / shares; }
};

/// Blocks of about `wanted` rows. Where there are too few rows to keep every thread busy, panels are shared
/// out too: each share then packs its rows again, which costs less than a barrier.
Cut make_cut(int64_t rows, int64_t panels, int64_t wanted, int64_t max_rows, int64_t threads) {
    Cut cut{rows, 0, panels, 0, 0};
    cut.blocks = ceil_div(rows, wanted);
    cut.shares = 1;
    if (threads > 1 && cut.blocks < 4 * threads) {
        if (rows >= 2 * max_rows * threads) {
            // Equal blocks, a multiple of the threads.
            cut.blocks = ceil_div(cut.blocks, threads) * threads;
        } else {
            cut.shares = std::min(panels, ceil_div(2 * threads, cut.blocks));
        }
    }
    cut.block = ceil_div(rows, cut.blocks);
    return cut;
}

/// Rows of a block in A panels of nearly equal height.
struct Groups {
    int64_t rows, count;
    Groups(int64_t rows_, int64_t max_rows) : rows(rows_), count(ceil_div(rows_, max_rows)) {}
    int64_t begin(int64_t g) const { return rows * g / count; }
    int64_t height(int64_t g) const { return begin(g + 1) - begin(g); }
};

constexpr int64_t kMaxWorkers = 256;

/// Runs fn(item, worker's scratch) for every item. A worker first takes its own contiguous share of the
/// items, so that a layer finds the rows which the layer before left in this core's cache, and then helps the
/// others.
template <typename Fn>
void for_each_item(int64_t items, int64_t workers, float* scratch, int64_t scratch_floats, const Fn& fn) {
    std::atomic<int64_t> next[kMaxWorkers];
    for (int64_t w = 0; w < workers; ++w) {
        next[w].store(items * w / workers, std::memory_order_relaxed);
    }
    parallel_for(workers, kSerialBytes, [&](int64_t begin, int64_t end) {
        for (int64_t worker = begin; worker < end; ++worker) {
            for (int64_t turn = 0; turn < workers; ++turn) {
                const int64_t owner = (worker + turn) % workers, last = items * (owner + 1) / workers;
                for (int64_t item; (item = next[owner].fetch_add(1, std::memory_order_relaxed)) < last;) {
                    fn(item, scratch + worker * scratch_floats);
                }
            }
        }
    });
}

int64_t workers_for(int64_t items, int64_t threads) { return std::min({items, threads, kMaxWorkers}); }

/// A power-of-two distance between rows would put them into the same cache sets.
constexpr int64_t kSkew = 16;

GemmFinish finish_at(const ConvArgs& args, int64_t channel, int64_t columns) {
    const ConvEpilogue& e = args.epilogue;
    return {e.scale + channel, e.shift + channel, nullptr, columns, e.activation, e.slope};
}

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

struct Tile {
    int64_t image, y, x;  // of the first output pixel
};

bool run_winograd(int m, const ConvArgs& args) {
    const ConvKernels& kernels = conv_kernels();
    const ConvShape& s = args.shape;
    const int64_t n = m + 2, positions = n * n, width = kernels.panel, channels = s.channels,
                  ho = s.out_height(), wo = s.out_width();
    const int64_t tiles_h = ceil_div(ho, m), tiles_w = ceil_div(wo, m), padded = chunks_of(channels) * kChunk;
    const int64_t panels = ceil_div(s.channels_out, width), panel_floats = positions * channels * width;
    const int64_t budget = cache_sizes().l2_bytes * 3 / 4 / 4;
    const int64_t wanted = std::clamp<int64_t>(budget / (positions * (padded + width)), 2 * kernels.max_rows,
                                               4 * kernels.max_rows);
    const Cut cut = make_cut(s.n * tiles_h * tiles_w, panels, wanted, kernels.max_rows, args.threads);
    const int64_t v_position = cut.block * padded + kSkew;
    const int64_t v_floats = positions * v_position, m_floats = positions * cut.block * width;
    const int64_t scratch_floats = v_floats + m_floats + kSkew;
    const int64_t workers = workers_for(cut.items(), args.threads);
    Scratch scratch((workers * scratch_floats + padded) * 4);
    float* zeros = scratch.as<float>() + workers * scratch_floats;
    std::fill(zeros, zeros + padded, 0.0f);
    std::atomic<bool> finite{true};
    const auto tile_of = [&](int64_t t) {
        const int64_t row = t / tiles_w;
        return Tile{row / tiles_h, row % tiles_h * m, t % tiles_w * m};
    };
    for_each_item(cut.items(), workers, scratch.as<float>(), scratch_floats, [&](int64_t item, float* v) {
        const int64_t block = item / cut.shares, share = item % cut.shares, first = cut.row(block);
        float* products = v + v_floats;
        const int64_t count = cut.row(block + 1) - first;
        const Groups groups(count, kernels.max_rows);
        WinogradInArgs in{};
        in.stride_h = args.stride_h, in.stride_w = args.stride_w;
        in.height = s.height, in.width = s.width, in.channels = channels, in.zeros = zeros;
        in.v_position = v_position;
        for (int64_t g = 0; g < groups.count; ++g) {
            for (int64_t i = 0; i < groups.height(g); ++i) {
                const Tile tile = tile_of(first + groups.begin(g) + i);
                in.x = args.x + tile.image * args.stride_n;
                in.y0 = tile.y - s.pad_h, in.x0 = tile.x - s.pad_w;
                in.v = v + groups.begin(g) * padded + i * kChunk;
                in.v_chunk = groups.height(g) * kChunk;
                kernels.winograd_in[m / 4](in);
            }
        }
        bool all_finite = true;
        const float* u = args.packed + cut.panel(share) * panel_floats;
        for (int64_t p = cut.panel(share); p < cut.panel(share + 1); ++p) {
            for (int64_t at = 0; at < positions; ++at, u += channels * width) {
                for (int64_t g = 0; g < groups.count; ++g) {
                    const float* ahead = g * 16 < width ? u + channels * width + g * channels * 16 : u;
                    kernels.gemm[groups.height(g)]({v + at * v_position + groups.begin(g) * padded, u,
                                                    channels,
                                                    products + (groups.begin(g) * positions + at) * width,
                                                    positions * width, reinterpret_cast<const char*>(ahead)});
                }
            }
            WinogradOutArgs out{};
            out.stride_h = wo * s.channels_out, out.stride_w = s.channels_out;
            out.finish = finish_at(args, p * width, std::min(width, s.channels_out - p * width));
            for (int64_t i = 0; i < count; ++i) {
                const Tile tile = tile_of(first + i);
                const int64_t at = ((tile.image * ho + tile.y) * wo + tile.x) * s.channels_out + p * width;
                out.m = products + i * positions * width;
                out.out = args.out + at;
                out.finish.residual = args.epilogue.residual ? args.epilogue.residual + at : nullptr;
                out.rows = std::min<int64_t>(m, ho - tile.y);
                out.columns = std::min<int64_t>(m, wo - tile.x);
                all_finite &= kernels.winograd_out[m / 4](out);
            }
        }
        if (!all_finite) {
            finite.store(false, std::memory_order_relaxed);
        }
    });
    return finite.load();
}

}  // namespace

bool conv_run(ConvAlgorithm algorithm, const ConvArgs& args) {
    if (algorithm == ConvAlgorithm::kDirect) {
        run_direct(args);
        return true;
    }
    return run_winograd(static_cast<int>(algorithm), args);
}

}  // namespace dl4ds
