// The algorithms with fewer multiplications: a block of tiles is transformed (A panels for every product),
// multiplied product by product, transformed back and finished, while it is in cache.
#include <span>

#include "ops/conv_bn_act/conv_cut_cpu.h"

namespace dl4ds {
namespace {

/// Winograd's F(m x m, 3x3): a tile is m x m output pixels, a product a transformed position.
class Winograd {
  public:
    Winograd(int m, const ConvArgs& args)
        : m_(m),
          args_(args),
          tiles_h_(ceil_div(args.shape.out_height(), m)),
          tiles_w_(ceil_div(args.shape.out_width(), m)),
          whole_{args.x, args.shape.channels, args.stride_n, args.stride_h, args.stride_w},
          parts_(args.part_count > 0 ? args.parts : &whole_, args.part_count > 0 ? args.part_count : 1) {}

    int64_t products() const { return (m_ + 2) * (m_ + 2); }
    int64_t k() const { return args_.shape.channels; }
    int64_t tiles() const { return args_.shape.n * tiles_h_ * tiles_w_; }
    int64_t panels() const { return ceil_div(args_.shape.channels_out, conv_kernels().panel); }

    void in(int64_t t, float* v, int64_t v_product, int64_t v_chunk, const float* zeros) const {
        const ConvShape& s = args_.shape;
        const Tile tile = at(t);
        for (const ConvSource& part : parts_) {
            conv_kernels().winograd_in[winograd_index(m_)](
                {part.x + tile.image * part.stride_n, part.stride_h, part.stride_w, tile.y - s.pad_h,
                 tile.x - s.pad_w, s.height, s.width, part.channels, zeros, v, v_product, v_chunk});
            v += part.channels / kChunk * v_chunk;
        }
    }

    bool out(int64_t first, int64_t count, int64_t panel, const float* sums) const {
        const ConvShape& s = args_.shape;
        const int64_t ho = s.out_height(), wo = s.out_width(), width = conv_kernels().panel;
        GemmFinish finish = finish_at(args_, panel * width, std::min(width, s.channels_out - panel * width));
        bool finite = true;
        for (int64_t i = 0; i < count; ++i) {
            const Tile tile = at(first + i);
            const int64_t place = ((tile.image * ho + tile.y) * wo + tile.x) * s.channels_out + panel * width;
            finish.residual = args_.epilogue.residual ? args_.epilogue.residual + place : nullptr;
            finite &= conv_kernels().winograd_out[winograd_index(m_)](
                {sums + i * products() * width, args_.out + place, wo * s.channels_out, s.channels_out,
                 std::min<int64_t>(m_, ho - tile.y), std::min<int64_t>(m_, wo - tile.x), finish});
        }
        return finite;
    }

    /// What tiles [first, last] read and the tiles before them did not, and what they write.
    void ahead(Ahead& next, int64_t first, int64_t last) const {
        const ConvShape& s = args_.shape;
        for (int64_t t = first; t <= last;) {  // the tiles of one row at a time
            const int64_t end = std::min(last + 1, (t / tiles_w_ + 1) * tiles_w_);
            const Tile tile = at(t);
            const int64_t left = std::max<int64_t>(tile.x - s.pad_w, 0),
                          right = std::min(at(end - 1).x - s.pad_w + m_ + 2, s.width);
            for (const ConvSource& part : parts_) {
                for (int64_t y = std::max<int64_t>(tile.y - s.pad_h + 2, 0);
                     part.stride_w == part.channels && y < std::min(tile.y - s.pad_h + 2 + m_, s.height);
                     ++y) {
                    const float* row = part.x + tile.image * part.stride_n + y * part.stride_h;
                    next.add(row + left * part.stride_w, row + right * part.stride_w);
                }
            }
            for (int64_t y = tile.y; y < std::min(tile.y + m_, s.out_height()); ++y) {
                const float* row =
                    args_.out + (tile.image * s.out_height() + y) * s.out_width() * s.channels_out;
                const int64_t past = std::min(at(end - 1).x + m_, s.out_width());
                next.add(row + tile.x * s.channels_out, row + past * s.channels_out);
            }
            t = end;
        }
    }

  private:
    struct Tile {
        int64_t image, y, x;  // of the first output pixel
    };

    Tile at(int64_t t) const {
        const int64_t row = t / tiles_w_;
        return {row / tiles_h_, row % tiles_h_ * m_, t % tiles_w_ * m_};
    }

    const int m_;
    const ConvArgs& args_;
    const int64_t tiles_h_, tiles_w_;
    const ConvSource whole_;
    const std::span<const ConvSource> parts_;
};

/// One step of Strassen: a tile is two neighbouring pixels of an image, a product half the input channels
/// with half the output channels.
class Strassen {
  public:
    explicit Strassen(const ConvArgs& args)
        : args_(args),
          pixels_(args.shape.out_height() * args.shape.out_width()),
          tiles_of_image_(ceil_div(pixels_, 2)) {}

    int64_t products() const { return 7; }
    int64_t k() const { return args_.shape.channels / 2; }
    int64_t tiles() const { return args_.shape.n * tiles_of_image_; }
    int64_t panels() const { return args_.shape.channels_out / 2 / conv_kernels().panel; }

    void in(int64_t t, float* v, int64_t v_product, int64_t v_chunk, const float* zeros) const {
        const int64_t image = t / tiles_of_image_, pixel = t % tiles_of_image_ * 2;
        const float* bottom = pixel + 1 < pixels_ ? input(image, pixel + 1) : zeros;
        conv_kernels().strassen_in({input(image, pixel), bottom, k(), v, v_product, v_chunk});
    }

    bool out(int64_t first, int64_t count, int64_t panel, const float* sums) const {
        const int64_t width = conv_kernels().panel, channels = args_.shape.channels_out;
        GemmFinish finish = finish_at(args_, panel * width, width);
        bool finite = true;
        for (int64_t t = first; t < first + count;) {  // the tiles of one image at a time
            const int64_t image = t / tiles_of_image_, tile = t % tiles_of_image_;
            const int64_t run = std::min(first + count - t, tiles_of_image_ - tile);
            const int64_t place = (image * pixels_ + 2 * tile) * channels + panel * width;
            finish.residual = args_.epilogue.residual ? args_.epilogue.residual + place : nullptr;
            finite &= conv_kernels().strassen_out({sums + (t - first) * products() * width, args_.out + place,
                                                   channels, channels / 2,
                                                   std::min(2 * run, pixels_ - 2 * tile), finish});
            t += run;
        }
        return finite;
    }

    void ahead(Ahead& next, int64_t first, int64_t last) const {
        const int64_t from = 2 * (first % tiles_of_image_),
                      to = std::min(2 * (last % tiles_of_image_) + 2, pixels_);
        const int64_t image = last / tiles_of_image_, channels = args_.shape.channels_out;
        if (first / tiles_of_image_ != image) {
            return;
        }
        if (args_.stride_w == args_.shape.channels && args_.shape.stride_h == 1) {
            next.add(input(image, from), input(image, to - 1) + args_.shape.channels);
        }
        const int64_t place = (image * pixels_ + from) * channels, count = (to - from) * channels;
        if (args_.epilogue.residual != nullptr) {
            next.add(args_.epilogue.residual + place, args_.epilogue.residual + place + count);
        }
        next.add(args_.out + place, args_.out + place + count);
    }

  private:
    const float* input(int64_t image, int64_t pixel) const {
        const int64_t wo = args_.shape.out_width();
        return args_.x + image * args_.stride_n + pixel / wo * args_.shape.stride_h * args_.stride_h +
               pixel % wo * args_.shape.stride_w * args_.stride_w;
    }

    const ConvArgs& args_;
    const int64_t pixels_, tiles_of_image_;
};

template <class Transform>
bool run(const Transform& transform, const ConvArgs& args) {
    const ConvKernels& kernels = conv_kernels();
    const int64_t products = transform.products(), k = transform.k(), width = kernels.panel;
    const int64_t padded = chunks_of(k) * kChunk, panel_floats = products * k * width;
    const int64_t budget = cache_sizes().l2_bytes * 3 / 4 / 4;
    const int64_t wanted = std::clamp<int64_t>(budget / (products * (padded + width)), 2 * kernels.max_rows,
                                               4 * kernels.max_rows);
    const Cut cut = make_cut(transform.tiles(), transform.panels(), wanted, kernels.max_rows, args.threads);
    const int64_t v_product = cut.block * padded + kSkew, v_floats = products * v_product;
    const int64_t scratch_floats = v_floats + products * cut.block * width + kSkew;
    const int64_t workers = workers_for(cut.items(), args.threads);
    Scratch scratch((workers * scratch_floats + 2 * padded) * 4);
    float* zeros = scratch.as<float>() + workers * scratch_floats;
    std::fill(zeros, zeros + 2 * padded, 0.0f);
    std::atomic<bool> finite{true};
    for_each_item(cut.items(), workers, scratch.as<float>(), scratch_floats, [&](int64_t item, float* v) {
        const int64_t block = item / cut.shares, share = item % cut.shares, first = cut.row(block);
        float* sums = v + v_floats;
        const int64_t count = cut.row(block + 1) - first;
        const Groups groups(count, kernels.max_rows);
        for (int64_t g = 0; g < groups.count; ++g) {
            float* to = v + groups.begin(g) * padded;
            for (int64_t i = 0; i < groups.height(g); ++i) {
                transform.in(first + groups.begin(g) + i, to + i * kChunk, v_product,
                             groups.height(g) * kChunk, zeros);
            }
        }
        Ahead next;
        if (block + 1 < cut.blocks && cut.shares == 1) {
            transform.ahead(next, cut.row(block + 1), cut.row(block + 2) - 1);
        }
        bool all_finite = true;
        const float* u = args.packed + cut.panel(share) * panel_floats;
        for (int64_t p = cut.panel(share); p < cut.panel(share + 1); ++p) {
            for (int64_t at = 0; at < products; ++at, u += k * width) {
                for (int64_t g = 0; g < groups.count; ++g) {
                    // The first groups ask for the next product's weights, the others for the next block.
                    const char* ahead = g * 16 < width
                                            ? reinterpret_cast<const char*>(u + k * width + g * k * 16)
                                            : next.take(k * 64, reinterpret_cast<const char*>(u));
                    kernels.gemm[groups.height(g)]({v + at * v_product + groups.begin(g) * padded, u, k,
                                                    sums + (groups.begin(g) * products + at) * width,
                                                    products * width, ahead});
                }
            }
            all_finite &= transform.out(first, count, p, sums);
        }
        if (!all_finite) {
            finite.store(false, std::memory_order_relaxed);
        }
    });
    return finite.load();
}

}  // namespace

bool conv_run_transformed(ConvAlgorithm algorithm, const ConvArgs& args) {
    if (algorithm == ConvAlgorithm::kStrassen) {
        return run(Strassen(args), args);
    }
    return run(Winograd(static_cast<int>(algorithm), args), args);
}

}  // namespace dl4ds
