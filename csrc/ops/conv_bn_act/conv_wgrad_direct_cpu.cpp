// The gradient of a weight as one product: dW[o][tap, c] = sum over pixels of dout[pixel][o] times the value
// of x that the tap sees there. Blocks of pixels are copied into the order of the kernel (fields of x as the
// engine packs them, dout likewise). Where the product is small, the pixels are cut into parts, each with
// sums of its own, which are added in the end: a thread then works on a part alone and meets the others once
// instead of twice a block. Every sum runs over its pixels in order, in pieces and parts that depend on the
// sizes alone: same bits for any number of threads.
#include "ops/conv_bn_act/conv_cut_cpu.h"
#include "ops/conv_bn_act/conv_train_cpu.h"

namespace dl4ds {
namespace {

constexpr int64_t kCall = 128;  // pixels of one product: a panel of them stays in L1; 129 is the most
constexpr int64_t kBlockBytes = 1 << 19;        // of copied pixels, for all threads
constexpr int64_t kAloneBytes = 1 << 18;        // the same for a thread that works alone
constexpr int64_t kMostCalls = 16;              // of a block
constexpr int64_t kSumsBytes = 1 << 20;         // of all parts
constexpr int64_t kParts = 8, kLeastCalls = 8;  // or one part; calls of each

/// Sizes of what one call works with.
struct Plan {
    int64_t pixels, fields;         // fields: values of a receptive field, [tap][channel]
    int64_t width, panels;          // of a panel of fields
    int64_t in_chunks, out_chunks;  // whole panels of them
    int64_t rows, calls, block;     // pixels of a call, calls in all, calls of a block
    int64_t parts;                  // that the calls are cut into
    bool alone;                     // whether a thread works on a part alone

    Plan(const ConvShape& s, int64_t threads)
        : pixels(s.n * s.out_height() * s.out_width()),
          fields(s.taps() * s.channels),
          width(conv_kernels().panel),
          panels(ceil_div(fields, width)),
          in_chunks(ceil_div(panels * width, kChunk)),
          out_chunks(chunks_of(s.channels_out)) {
        // An odd number keeps the chunks of a pixel out of each other's cache sets.
        rows = ceil_div(pixels, ceil_div(pixels, kCall)) | 1;
        calls = ceil_div(pixels, rows);
        parts = kParts * sums() * 4 <= kSumsBytes && calls >= kParts * kLeastCalls ? kParts : 1;
        alone = threads > 1 && parts > 1 && (parts % threads == 0 || parts > 4 * threads);
        const int64_t fit = (alone ? kAloneBytes : kBlockBytes) / ((in_chunks + out_chunks) * chunk() * 4);
        block = std::min(std::clamp<int64_t>(fit, 1, kMostCalls), calls);
    }

    // In floats: one chunk of a call, its fields and its pixels of dout, a chunk of outputs by a panel.
    int64_t chunk() const { return rows * kChunk; }
    int64_t in_call() const { return in_chunks * chunk(); }
    int64_t out_call() const { return out_chunks * chunk(); }
    int64_t tile() const { return kChunk * width; }
    int64_t sums() const { return out_chunks * panels * tile(); }  // of a part
    int64_t first_call(int64_t part) const { return calls * part / parts; }
    int64_t count(int64_t call) const { return std::min(rows, pixels - call * rows); }
};

/// Pixels [first, first + rows) of a call.
void copy_pixels(const WgradArgs& args, const ConvShape& pixel_shape, const Plan& plan, int64_t call,
                 int64_t first, int64_t rows, float* x, float* dout, float* line) {
    const ConvShape& s = args.shape;
    const int64_t at = call * plan.rows + first, wo = s.out_width();
    if (args.prologue != nullptr) {
        conv_kernels().pack_sources({args.prologue, &s, at, rows, x + first * kChunk, plan.rows});
    } else {
        conv_kernels().pack({args.x, args.stride_n, args.stride_h, args.stride_w, &s, at, rows,
                             x + first * kChunk, line, plan.rows});
    }
    for (int64_t c = chunks_of(plan.fields); c < plan.in_chunks; ++c) {  // its products are not used
        float* zeros = x + c * plan.chunk() + first * kChunk;
        std::fill(zeros, zeros + rows * kChunk, 0.0f);
    }
    conv_kernels().pack({args.dout, s.out_height() * wo * s.channels_out, wo * s.channels_out, s.channels_out,
                         &pixel_shape, at, rows, dout + first * kChunk, line, plan.rows});
}

/// What copy_pixels will read of pixels [first, end).
void add_pixels(Ahead& ahead, const WgradArgs& args, int64_t first, int64_t end) {
    const ConvShape& s = args.shape;
    if (first < end) {
        if (args.prologue != nullptr) {
            add_sources(ahead, *args.prologue, s, first, end - 1);
        } else {
            add_input(ahead, {args.x, args.stride_n, args.stride_h, args.stride_w, s.channels}, s, first,
                      end - 1);
        }
        ahead.add(args.dout + first * s.channels_out, args.dout + end * s.channels_out);
    }
}

/// The products of one panel of fields with chunks [begin, end) of outputs, over one call.
void multiply(const Plan& plan, int64_t panel, int64_t begin, int64_t end, int64_t pixels, bool add,
              const float* x, const float* dout, float* d, Ahead& ahead) {
    const TrainKernels& kernels = train_kernels();
    const Groups groups(kChunk, kernels.gemm_rows);
    const int64_t lane = panel * plan.width;
    const float* b = x + lane / kChunk * plan.chunk() + lane % kChunk;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        const float* a = dout + chunk * plan.chunk();
        float* to = d + (chunk * plan.panels + panel) * plan.tile();
        for (int64_t g = 0; g < groups.count; ++g) {
            const int64_t row = groups.begin(g);
            const char* instead = reinterpret_cast<const char*>(a + plan.chunk());
            kernels.wgrad_gemm[groups.height(g)]({a + row, b, plan.chunk(), pixels, kPixelChain,
                                                  to + row * plan.width, add,
                                                  ahead.take(pixels * 64, instead)});
        }
    }
}

bool all_finite(const float* values, int64_t n) {
    constexpr int64_t kSums = 16;  // side by side: one sum would wait for itself
    float sums[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= n; i += kSums) {
        for (int64_t j = 0; j < kSums; ++j) {
            sums[j] += values[i + j] * 0.0f;
        }
    }
    for (; i < n; ++i) {
        sums[0] += values[i] * 0.0f;
    }
    return std::all_of(sums, sums + kSums, [](float sum) { return sum == 0.0f; });
}

/// The gradient of output channel o's filters from the panels of all parts. False: a value is infinite or
/// NaN, and zeros of the padding were multiplied.
bool put_filters(const WgradArgs& args, const Plan& plan, int64_t o, const float* d, float* line) {
    const ConvShape& s = args.shape;
    float* to = args.dweight + o * args.layout.out;
    const bool straight = args.layout.in == 1 && (s.taps() == 1 || args.layout.tap == s.channels);
    float* row = straight ? to : line;
    for (int64_t p = 0; p < plan.panels; ++p) {
        const float* from = d + (o / kChunk * plan.panels + p) * plan.tile() + o % kChunk * plan.width;
        const int64_t columns = std::min(plan.width, plan.fields - p * plan.width);
        std::copy(from, from + columns, row + p * plan.width);
        for (int64_t part = 1; part < plan.parts; ++part) {
            from += plan.sums();
            for (int64_t i = 0; i < columns; ++i) {
                row[p * plan.width + i] += from[i];
            }
        }
    }
    for (int64_t c = 0; !straight && c < s.channels; ++c) {
        for (int64_t t = 0; t < s.taps(); ++t) {
            to[c * args.layout.in + t * args.layout.tap] = line[t * s.channels + c];
        }
    }
    return (s.pad_h == 0 && s.pad_w == 0) || all_finite(row, plan.fields);
}

/// What threads that work on a part together, or one alone, copy pixels to.
struct Copies {
    float *x, *dout;
};

/// The sums of one part into `d`. loop(items, fn): fn(begin, end) on ranges that cover [0, items).
template <typename Loop>
void sum_part(const WgradArgs& args, const Plan& plan, int64_t part, const Copies& to, float* d,
              const Loop& loop) {
    const ConvShape& s = args.shape;
    const ConvShape pixel_shape{s.n, s.channels_out, s.out_height(), s.out_width(), 1, 1, 1, 1, 1, 0, 0, 1, 1,
                                1};
    const int64_t line_bytes = (chunks_of(std::max(plan.fields, s.channels_out)) + 1) * kChunk * 4;
    const int64_t most = conv_kernels().max_rows, groups = ceil_div(plan.rows, most);
    // Panels alone where they are enough for the threads: each then keeps its panel in L1.
    const int64_t shares =
        plan.alone || plan.panels >= 16 ? 1 : std::min(plan.out_chunks, ceil_div(16, plan.panels));
    const int64_t first_call = plan.first_call(part), last_call = plan.first_call(part + 1);
    for (int64_t start = first_call; start < last_call; start += plan.block) {
        const int64_t calls = std::min(plan.block, last_call - start);
        loop(calls * groups, [&](int64_t begin, int64_t end) {
            Scratch line(line_bytes);
            for (int64_t item = begin; item < end; ++item) {
                const int64_t call = item / groups, first = item % groups * most;
                const int64_t rows = std::min(most, plan.count(start + call) - first);
                if (rows > 0) {
                    copy_pixels(args, pixel_shape, plan, start + call, first, rows,
                                to.x + call * plan.in_call(), to.dout + call * plan.out_call(),
                                line.as<float>());
                }
            }
        });
        // While a block is multiplied, every item asks for its share of the next: the same threads that will
        // copy it.
        const int64_t items = plan.panels * shares, next = (start + calls) * plan.rows,
                      after = std::min({next + plan.block * plan.rows, last_call * plan.rows, plan.pixels});
        loop(items, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; ++item) {
                const int64_t panel = item / shares, share = item % shares;
                const int64_t left = std::max<int64_t>(after - next, 0);
                Ahead ahead;
                add_pixels(ahead, args, next + left * item / items, next + left * (item + 1) / items);
                for (int64_t call = 0; call < calls; ++call) {
                    multiply(plan, panel, plan.out_chunks * share / shares,
                             plan.out_chunks * (share + 1) / shares, plan.count(start + call),
                             start + call > first_call, to.x + call * plan.in_call(),
                             to.dout + call * plan.out_call(), d, ahead);
                }
            }
        });
    }
}

}  // namespace

bool conv_wgrad_direct(const WgradArgs& args) {
    const ConvShape& s = args.shape;
    const Plan plan(s, args.threads);
    const int64_t x_floats = plan.block * plan.in_call(), out_floats = plan.block * plan.out_call() + kSkew,
                  copies = x_floats + out_floats, workers = plan.alone ? args.threads : 1;
    Scratch scratch((workers * copies + plan.parts * plan.sums()) * 4);
    float* const sums = scratch.as<float>() + workers * copies;
    std::atomic<bool> finite{true};
    with_team(args.threads, [&] {
        const auto sum = [&](int64_t part, float* own, const auto& loop) {
            sum_part(args, plan, part, {own, own + x_floats}, sums + part * plan.sums(), loop);
        };
        if (plan.alone) {
            for_each_item(plan.parts, workers, scratch.as<float>(), copies, [&](int64_t part, float* own) {
                sum(part, own, [](int64_t items, const auto& fn) { fn(int64_t{0}, items); });
            });
        } else {
            for (int64_t part = 0; part < plan.parts; ++part) {
                sum(part, scratch.as<float>(),
                    [](int64_t items, const auto& fn) { parallel_for(items, kSerialBytes, fn); });
            }
        }
        parallel_for(s.channels_out, kSerialBytes, [&](int64_t begin, int64_t end) {
            Scratch line((plan.panels * plan.width + kChunk) * 4);
            bool good = true;
            for (int64_t o = begin; o < end; ++o) {
                good &= put_filters(args, plan, o, sums, line.as<float>());
            }
            if (!good) {
                finite.store(false, std::memory_order_relaxed);
            }
        });
    });
    return finite.load();
}

}  // namespace dl4ds
