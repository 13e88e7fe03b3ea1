// The BatchNorm over a dense block's first channels, as the passes over its buffers share it.
#pragma once

#include "ops/bn_act/bn_act_host_cpu.h"

namespace dl4ds {

/// The pitch of t, which must be x's shape and dtype: channels_last or a slice of its channels.
inline int64_t dense_pitch(const char* op, const char* name, const TensorInfo& t, const TensorInfo& x) {
    check_same_shape(op, name, t, x);
    check_dtype(op, name, t, x.dtype);
    check_same_device(op, name, t, x);
    const int64_t pitch = pixel_pitch(t);
    DL4DS_CHECK(t.numel == 0 || pitch >= t.sizes[1], op, ": ", name,
                ": expected channels_last, or a slice of its channels");
    return pitch;
}

/// A vector that an op writes: (C,) without gaps, of one dtype.
inline void check_written(const char* op, const char* name, const TensorInfo& v, const TensorInfo& x,
                          DType dtype) {
    check_dtype(op, name, v, dtype);
    check_same_device(op, name, v, x);
    DL4DS_CHECK(v.dim == 1 && v.sizes[0] == x.sizes[1] && (v.numel < 2 || v.strides[0] == 1), op, ": ", name,
                ": expected shape (C,) = (", x.sizes[1], ",) without gaps, got ", v.shape());
}

/// Statistics are the features', taken once when they were written.
struct DenseNorm {
    TensorInfo weight, bias, mean, var;
    double eps;
    bool eps_std;

    void check(const char* op, const TensorInfo& x) const {
        check_channel_vector(op, "weight", weight, x);
        check_channel_vector(op, "bias", bias, x);
        check_channel_vector(op, "mean", mean, x);
        check_channel_vector(op, "var", var, x);
    }

    /// The very constant that bn_act makes of these vectors in eval mode.
    template <typename T>
    T rstd(int64_t c) const {
        return static_cast<T>(bn_rstd(channel_entry<double>(var, c, 1.0), eps, eps_std));
    }

    /// Of channel c: act((x - mean) * scale + shift), bit for bit as bn_act has it.
    template <typename T>
    void constants(int64_t c, T& center, T& scale, T& shift) const {
        center = channel_entry<T>(mean, c, T(0));
        scale = channel_entry<T>(weight, c, T(1)) * rstd<T>(c);
        shift = channel_entry<T>(bias, c, T(0));
    }

    /// From the sums of channel c over n pixels, s1 of dz and s2 of dz (x - mean): the vectors' gradients,
    /// and what is linear in x of dx = w rstd (dz - S1/n - (x - mean) k S2/n), as in bn_act_bwd.
    template <typename T>
    void add_gradients(int64_t c, double n, double s1, double s2, T& dweight, T& dbias, double& factor,
                       double& offset) const {
        const double r = static_cast<double>(rstd<T>(c));
        dweight = static_cast<T>(s2 * r);
        dbias = static_cast<T>(s1);
        const double scale = channel_entry<double>(weight, c, 1.0) * r;
        double k = r * r;
        if (eps_std) {
            const double sigma = 1.0 / r - eps;
            k = sigma > 0 ? r / sigma : 0.0;
        }
        factor -= scale * k * s2 / n;
        offset -= scale * s1 / n;
    }
};

}  // namespace dl4ds
