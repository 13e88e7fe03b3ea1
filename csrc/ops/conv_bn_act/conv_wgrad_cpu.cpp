// Drivers of conv_train_cpu.h: filters into the transformed domain, and the gradient of the filters.
#include "ops/conv_bn_act/conv_cut_cpu.h"
#include "ops/conv_bn_act/conv_train_cpu.h"

namespace dl4ds {
namespace {

constexpr int64_t kPositions = 16;
constexpr int64_t kCall = 128;                        // tiles of one product: B stays in L1
constexpr int64_t kMinBlock = 128, kMaxBlock = 1024;  // tiles that are transformed at a time
constexpr int64_t kBlockBytes = 2 << 20;              // of transformed tiles, for all threads

/// Sizes of the transformed tensors of one call.
struct Plan {
    int64_t tiles_h, tiles_w, tiles, block;
    int64_t in_chunks, out_chunks;  // whole panels of them
    int64_t panels;                 // of input channels

    explicit Plan(const ConvShape& s)
        : tiles_h(ceil_div(s.out_height(), 2)),
          tiles_w(ceil_div(s.out_width(), 2)),
          tiles(s.n * tiles_h * tiles_w) {
        panels = ceil_div(s.channels, conv_kernels().panel);
        in_chunks = ceil_div(panels * conv_kernels().panel, kChunk);
        out_chunks = chunks_of(s.channels_out);
        const int64_t fit = kBlockBytes / (kPositions * (in_chunks + out_chunks) * kChunk * 4);
        block = std::min(std::clamp(fit / kCall * kCall, kMinBlock, kMaxBlock), tiles);
    }

    // Distances in floats; the skew keeps positions out of each other's cache sets.
    int64_t v_position() const { return in_chunks * block * kChunk + kSkew; }
    int64_t e_position() const { return out_chunks * block * kChunk + kSkew; }
    int64_t d_block() const { return kChunk * conv_kernels().panel; }  // one chunk of outputs, one panel
    int64_t d_position() const { return out_chunks * panels * d_block(); }
};

/// Tiles [first, end) of x and dout, transformed.
void transform_tiles(const WgradArgs& args, const Plan& plan, int64_t start, int64_t first, int64_t end,
                     float* v, float* e, const float* zeros) {
    const ConvShape& s = args.shape;
    const int64_t ho = s.out_height(), wo = s.out_width();
    for (int64_t t = first; t < end; ++t) {
        const int64_t row = t / plan.tiles_w, image = row / plan.tiles_h;
        const int64_t y = row % plan.tiles_h * 2, x = t % plan.tiles_w * 2, at = (t - start) * kChunk;
        conv_kernels().winograd_in[winograd_index(2)](
            {args.x + image * args.stride_n, args.stride_h, args.stride_w, y - s.pad_h, x - s.pad_w, s.height,
             s.width, s.channels, zeros, v + at, plan.v_position(), plan.block * kChunk});
        train_kernels().wgrad_in({args.dout + ((image * ho + y) * wo + x) * s.channels_out,
                                  wo * s.channels_out, s.channels_out, ho - y, wo - x, s.channels_out, e + at,
                                  plan.e_position(), plan.block * kChunk});
    }
}

/// dU of one position and a panel of input channels; `tiles` of the block are filled.
void multiply(const Plan& plan, int64_t item, int64_t tiles, bool add, const float* v, const float* e,
              float* d) {
    const TrainKernels& kernels = train_kernels();
    const Groups groups(kChunk, kernels.gemm_rows);
    const int64_t width = conv_kernels().panel, panel = item % plan.panels, position = item / plan.panels;
    const int64_t stride = plan.block * kChunk;
    const float* b =
        v + position * plan.v_position() + panel * width / kChunk * stride + panel * width % kChunk;
    for (int64_t k = 0; k < tiles; k += kCall) {
        const float* a = e + position * plan.e_position() + k * kChunk;
        float* to = d + position * plan.d_position() + panel * plan.d_block();
        for (int64_t chunk = 0; chunk < plan.out_chunks;
             ++chunk, a += stride, to += plan.panels * plan.d_block()) {
            for (int64_t g = 0; g < groups.count; ++g) {
                const int64_t row = groups.begin(g);
                kernels.wgrad_gemm[groups.height(g)](
                    {a + row, b + k * kChunk, stride, std::min(kCall, tiles - k), kTileChain,
                     to + row * width, add || k > 0, reinterpret_cast<const char*>(a + stride)});
            }
        }
    }
}

}  // namespace

void conv_pack_filters2(const ConvShape& s, const float* weight, const FilterLayout& layout, bool gradient,
                        float* packed) {
    const int64_t width = conv_kernels().panel, panels = ceil_div(s.channels_out, width);
    // Lanes are what the running convolution gives out, rows what it sums over.
    const int64_t lane = gradient ? layout.in : layout.out, row = gradient ? layout.out : layout.in;
    const int64_t parts = ceil_div(s.channels, 4 * kFilterRows), u_position = s.channels * width;
    parallel_for(panels * parts, s.channels * s.channels_out * 25 * 4, [&](int64_t begin, int64_t end) {
        Scratch scratch(kFilterRows * 9 * width * 4);
        for (int64_t item = begin; item < end; ++item) {
            const int64_t panel = item / parts, first = item % parts * 4 * kFilterRows;
            train_kernels().filter({weight + panel * width * lane + first * row, lane, row, layout.tap,
                                    gradient, std::min(width, s.channels_out - panel * width),
                                    std::min(4 * kFilterRows, s.channels - first),
                                    packed + panel * kPositions * u_position + first * width, u_position,
                                    scratch.as<float>()});
        }
    });
}

bool conv_wgrad_winograd2(const WgradArgs& args) {
    const ConvShape& s = args.shape;
    const Plan plan(s);
    const int64_t width = conv_kernels().panel, items = kPositions * plan.panels;
    const int64_t v_floats = kPositions * plan.v_position(), e_floats = kPositions * plan.e_position();
    const int64_t zeros = chunks_of(s.channels) * kChunk;
    Scratch scratch((v_floats + e_floats + kPositions * plan.d_position() + zeros) * 4);
    float *v = scratch.as<float>(), *e = v + v_floats, *d = e + e_floats,
          *zero = d + kPositions * plan.d_position();
    std::fill(zero, zero + zeros, 0.0f);
    std::atomic<bool> finite{true};
    with_team(args.threads, [&] {
        // Every sum runs over the tiles in order: same bits for any number of threads.
        for (int64_t start = 0; start < plan.tiles; start += plan.block) {
            const int64_t count = std::min(plan.block, plan.tiles - start);
            parallel_for(count, kSerialBytes, [&](int64_t begin, int64_t end) {
                transform_tiles(args, plan, start, start + begin, start + end, v, e, zero);
            });
            parallel_for(items, kSerialBytes, [&](int64_t begin, int64_t end) {
                for (int64_t item = begin; item < end; ++item) {
                    multiply(plan, item, count, start > 0, v, e, d);
                }
            });
        }
        parallel_for(s.channels_out, kSerialBytes, [&](int64_t begin, int64_t end) {
            bool all_finite = true;
            for (int64_t o = begin; o < end; ++o) {
                for (int64_t p = 0; p < plan.panels; ++p) {
                    const float* from =
                        d + (o / kChunk * plan.panels + p) * plan.d_block() + o % kChunk * width;
                    all_finite &= train_kernels().wgrad_out(
                        {from, plan.d_position(), std::min(width, s.channels - p * width),
                         args.dweight + o * args.layout.out + p * width * args.layout.in, args.layout.in,
                         args.layout.tap});
                }
            }
            if (!all_finite) {
                finite.store(false, std::memory_order_relaxed);
            }
        });
    });
    return finite.load();
}

}  // namespace dl4ds
