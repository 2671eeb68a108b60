// Loss, NLL and gradient of rows of logits against softened labels, for CPUs.
//
// Each row is worked on while it lies in cache: largest logit; exponentials and sums; gradient. It is
// plain C++ behind a C function, so that it is compiled without torch and serves any version of it.
// The contract is that of pskd/kernels/rows.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
// One copy of a function for each generation of processors; the loader chooses.
#define EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_PROCESSOR
#endif
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

namespace {

constexpr int64_t kBlock = 1024;  // summed in float32; the sums of blocks are added in float64
constexpr float kInfinity = std::numeric_limits<float>::infinity();

enum Reduction { kNone = 0, kSum = 1, kMean = 2 };
enum Type { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

INLINE float from_bfloat16(uint16_t half) { return from_bits(uint32_t(half) << 16); }

INLINE uint16_t to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return uint16_t(value != value ? 0x7fc0u : rounded);
}

INLINE float from_float16(uint16_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  const float finite = from_bits(magnitude) * 0x1p112f;  // moves the exponent, subnormals too
  const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : to_bits(finite);
  return from_bits(bits | uint32_t(half & 0x8000u) << 16);
}

INLINE uint16_t to_float16(float value) {
  const uint32_t bits = to_bits(value), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  // Adding 0.5 leaves a subnormal float16 in the lowest bits, rounded by the addition.
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half =
      magnitude >= (143u << 23) ? special : magnitude < (113u << 23) ? subnormal : normal;
  return uint16_t(half | sign >> 16);
}

// exp(x) of x <= 0 or NaN to about one unit in the last place; 0 where it is below 1.2e-38.
INLINE float exp_nonpositive(float x) {
  constexpr float lowest = -87.33654f, magic = 12582912.0f;  // 1.5 * 2^23: its sum is an integer
  const float clamped = x < lowest ? lowest : x;             // NaN stays
  const float shifted = clamped * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  // Coefficients: Cephes, expf.
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = p * r * r + r + 1.0f;
  const float power = from_bits((to_bits(shifted) - to_bits(magic) + 127u) << 23);
  return x < lowest ? 0.0f : y * power;
}

EACH_PROCESSOR void load(const void* from, int type, int64_t n, float* to) {
  const auto* half = static_cast<const uint16_t*>(from);
  if (type == kBFloat16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = from_bfloat16(half[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = from_float16(half[i]);
  }
}

EACH_PROCESSOR void store(const float* from, int type, int64_t n, void* to) {
  auto* half = static_cast<uint16_t*>(to);
  if (type == kBFloat16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) half[i] = to_bfloat16(from[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) half[i] = to_float16(from[i]);
  }
}

EACH_PROCESSOR float largest(const float* z, int64_t n) {
  float m = -kInfinity;
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < n; ++i) m = z[i] > m ? z[i] : m;
  return m;
}

struct Sums {
  double exps = 0.0;     // of exp(z - max)
  double shifted = 0.0;  // of the finite z - max
  double infinite = 0.0; // how many are -infinity
  double probs = 0.0;    // of the teacher
  double dot = 0.0;      // of the teacher's times z - max
};

// Sums of exp(z - max), which are left in e, and of z - max; e may be z. In e a class at -infinity is
// -0, and one whose exponential is too small for float32 is +0: only the latter gets a tail.
EACH_PROCESSOR void student_sums(const float* z, float max, int64_t n, float* e, Sums& sums) {
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(n, start + kBlock);
    float exps = 0.0f, shifted = 0.0f, infinite = 0.0f;
#pragma omp simd reduction(+ : exps, shifted, infinite)
    for (int64_t i = start; i < end; ++i) {
      const float t = z[i] - max, x = exp_nonpositive(t);
      e[i] = t == -kInfinity ? -0.0f : x;
      exps += x;
      shifted += t == -kInfinity ? 0.0f : t;
      infinite += t == -kInfinity ? 1.0f : 0.0f;
    }
    sums.exps += exps;
    sums.shifted += shifted;
    sums.infinite += infinite;
  }
}

// As student_sums, with a teacher's probabilities.
EACH_PROCESSOR void dense_sums(const float* z, float max, const float* p, int64_t n, float* e,
                               Sums& sums) {
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(n, start + kBlock);
    float exps = 0.0f, shifted = 0.0f, infinite = 0.0f, probs = 0.0f, dot = 0.0f;
#pragma omp simd reduction(+ : exps, shifted, infinite, probs, dot)
    for (int64_t i = start; i < end; ++i) {
      const float t = z[i] - max, x = exp_nonpositive(t);
      e[i] = x;
      exps += x;
      shifted += t == -kInfinity ? 0.0f : t;
      infinite += t == -kInfinity ? 1.0f : 0.0f;
      probs += p[i];
      dot += p[i] == 0.0f ? 0.0f : p[i] * t;  // 0 * -infinity is 0 here
    }
    sums.exps += exps;
    sums.shifted += shifted;
    sums.infinite += infinite;
    sums.probs += probs;
    sums.dot += dot;
  }
}

EACH_PROCESSOR void exponentials(const float* v, float max, int64_t n, float* q) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) q[i] = exp_nonpositive(v[i] - max);
}

// g = e * factor - p * weight - even
EACH_PROCESSOR void dense_gradient(float* g, const float* e, float factor, const float* p,
                                   float weight, float even, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) g[i] = e[i] * factor - p[i] * weight - even;
}

EACH_PROCESSOR void even_gradient(float* g, float factor, float even, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) g[i] = g[i] * factor - even;
}

// As even_gradient, without the tail for the classes at -infinity.
void masked_gradient(float* g, float factor, float even, float tail, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    g[i] = std::signbit(g[i]) ? -even : g[i] * factor - (even + tail);
  }
}

}  // namespace

extern "C" {

// A call. Strides are in elements from row to row; within a row elements lie side by side.
// kVersion changes with the meaning of a field: a library that was compiled from other sources than
// its caller refuses the call.
struct PSKDRows {
  int64_t size, version;  // sizeof(PSKDRows) and kVersion, as the caller knows them
  int64_t rows, classes;
  const void* logits;
  int64_t logits_stride;
  const int64_t* target;
  const void* teacher;  // probabilities, logits, or the kept probabilities; null: there is none
  int64_t teacher_stride;
  const int64_t* indices;  // of the kept probabilities, null: dense
  int64_t indices_stride, kept;
  const float* alpha_rows;  // null: one alpha
  double alpha, label_smoothing;
  int64_t ignore_index;
  void* grad;  // of the logits' type, may be the logits; null: none is wanted
  int64_t grad_stride;
  float* loss;                    // of each row, or one: reduced
  float *nll, *teacher_at_label;  // of each row; may be null
  int32_t logits_type, teacher_type, teacher_is_logits, threads;
  int32_t reduction;            // of the loss, over the rows that are not ignored
  int32_t gradient_is_of_mean;  // else of the sum
};

enum { kVersion = 2 };
enum { kDone = 0, kBadLabel, kBadAlpha, kBadIndex, kNoMemory, kBadCall };  // returned

}  // extern "C"

namespace {

// What a thread needs to convert and to keep a row: nothing of the size of the batch.
struct Scratch {
  std::vector<float> z, p;
  std::vector<int64_t> indices;
};

// A label or a listed class that left its range after `check`: another thread writes to it.
struct OutOfRange {
  int problem;
};

INLINE const void* row_of(const void* base, int type, int64_t offset) {
  return static_cast<const char*>(base) + offset * (type == kFloat32 ? 4 : 2);
}

// A row in float32: where it lies if it is of that type, else converted.
const float* as_float(const void* base, int type, int64_t offset, int64_t n,
                      std::vector<float>& buffer) {
  const void* from = row_of(base, type, offset);
  if (type == kFloat32) return static_cast<const float*>(from);
  buffer.resize(n);
  load(from, type, n, buffer.data());
  return buffer.data();
}

// weight * value where a weight of 0 silences whatever the value is.
INLINE double weighted(double weight, double value) { return weight == 0.0 ? 0.0 : weight * value; }

struct Teacher {
  double at_label = 0.0, mass = 0.0, expectation = 0.0, tail = 0.0;
};

class Row {
 public:
  Row(const PSKDRows& call, int64_t row, double scale, Scratch& scratch)
      : call_(call), row_(row), classes_(call.classes), scale_(scale), scratch_(scratch) {}

  float loss() {
    const int64_t label = call_.target[row_];
    if (label == call_.ignore_index) {
      ignore();
      return 0.0f;
    }
    if (label < 0 || label >= classes_) throw OutOfRange{kBadLabel};
    const double alpha = call_.alpha_rows ? call_.alpha_rows[row_] : call_.alpha;
    z_ = as_float(call_.logits, call_.logits_type, row_ * call_.logits_stride, classes_, scratch_.z);
    g_ = exponentials_row();
    max_ = largest(z_, classes_);
    const double label_shifted = z_[label] - max_;
    const double smoothing = call_.label_smoothing, hard = 1.0 - alpha;
    const bool soft = call_.teacher && (alpha != 0.0 || call_.teacher_at_label);
    Teacher teacher;
    if (!soft) {
      student_sums(z_, max_, classes_, g_, sums_);
    } else if (call_.indices) {
      teacher = sparse(label);
    } else {
      teacher = dense(label);
    }
    const double lse = std::log(sums_.exps);
    const double nll = lse - label_shifted;
    const double even = sums_.infinite > 0 ? kInfinity : lse - sums_.shifted / classes_;
    const double soft_loss = teacher.mass * lse - teacher.expectation;
    if (call_.nll) call_.nll[row_] = float(nll);
    if (call_.teacher_at_label) call_.teacher_at_label[row_] = float(teacher.at_label);
    if (call_.grad) write_gradient(alpha, soft && alpha != 0.0, teacher, label);
    return float(weighted(hard * (1.0 - smoothing), nll) + weighted(hard * smoothing, even) +
                 weighted(alpha, soft_loss));
  }

 private:
  const PSKDRows& call_;
  const int64_t row_, classes_;
  const double scale_;  // of the gradient
  Scratch& scratch_;
  const float* z_ = nullptr;
  const float* p_ = nullptr;  // a dense teacher's row, perhaps not yet divided by q_sum_
  double q_sum_ = 1.0;
  float* g_ = nullptr;
  float max_ = 0.0f;
  double masked_ = 0.0;  // classes at -infinity that a sparse teacher does not list
  Sums sums_;

  void* grad_row() const {
    return const_cast<void*>(row_of(call_.grad, call_.logits_type, row_ * call_.grad_stride));
  }

  // Where the exponentials are kept and become the gradient: its own row, or scratch where none is
  // wanted or it is of half precision, which is made over the converted logits and stored then.
  float* exponentials_row() {
    if (call_.grad && call_.logits_type == kFloat32) return static_cast<float*>(grad_row());
    scratch_.z.resize(classes_);
    return scratch_.z.data();
  }

  void ignore() {
    if (call_.nll) call_.nll[row_] = 0.0f;
    if (call_.teacher_at_label) call_.teacher_at_label[row_] = 1.0f;
    if (call_.grad) std::memset(grad_row(), 0, classes_ * (call_.logits_type == kFloat32 ? 4 : 2));
  }

  Teacher dense(int64_t label) {
    p_ = as_float(call_.teacher, call_.teacher_type, row_ * call_.teacher_stride, classes_,
                  scratch_.p);
    if (call_.teacher_is_logits) {
      const float max = largest(p_, classes_);
      scratch_.p.resize(classes_);
      exponentials(p_, max, classes_, scratch_.p.data());
      p_ = scratch_.p.data();
    }
    dense_sums(z_, max_, p_, classes_, g_, sums_);
    if (call_.teacher_is_logits) q_sum_ = sums_.probs;
    return {p_[label] / q_sum_, sums_.probs / q_sum_, sums_.dot / q_sum_, 0.0};
  }

  Teacher sparse(int64_t label) {
    const int64_t kept = call_.kept;
    const int64_t* indices = checked_indices();
    p_ = as_float(call_.teacher, call_.teacher_type, row_ * call_.teacher_stride, kept, scratch_.p);
    double listed = 0.0, listed_shifted = 0.0, listed_infinite = 0.0, expectation = 0.0;
    Teacher teacher;
    bool label_is_listed = false;
    for (int64_t j = 0; j < kept; ++j) {
      const float t = z_[indices[j]] - max_, p = p_[j];
      listed += p;
      expectation += weighted(p, t);
      if (t == -kInfinity) listed_infinite += 1.0;
      else listed_shifted += t;
      if (indices[j] == label) {
        label_is_listed = true;
        teacher.at_label = p;
      }
    }
    student_sums(z_, max_, classes_, g_, sums_);
    masked_ = sums_.infinite - listed_infinite;
    const double others = double(classes_ - kept) - masked_;
    teacher.tail = others > 0.0 ? std::max(0.0, 1.0 - listed) / others : 0.0;
    if (!label_is_listed) teacher.at_label = teacher.tail;
    teacher.expectation = expectation + weighted(teacher.tail, sums_.shifted - listed_shifted);
    teacher.mass = listed + teacher.tail * others;
    return teacher;
  }

  // A copy: what was checked is what is used, whoever writes to the original.
  const int64_t* checked_indices() {
    const int64_t* given = call_.indices + row_ * call_.indices_stride;
    scratch_.indices.assign(given, given + call_.kept);
    for (const int64_t index : scratch_.indices) {
      if (index < 0 || index >= classes_) throw OutOfRange{kBadIndex};
    }
    return scratch_.indices.data();
  }

  void write_gradient(double alpha, bool soft, const Teacher& teacher, int64_t label) {
    const double scale = scale_, hard = 1.0 - alpha, smoothing = call_.label_smoothing;
    const double mass = hard + (soft ? alpha * teacher.mass : 0.0);
    const float factor = float(scale * mass / sums_.exps);
    const double spread = scale * hard * smoothing / classes_;
    if (soft && !call_.indices) {
      dense_gradient(g_, g_, factor, p_, float(scale * alpha / q_sum_), float(spread), classes_);
    } else if (soft && masked_ > 0.0) {
      // A listed class is given the tail like every other here, and its own share below.
      for (const int64_t index : scratch_.indices) g_[index] = std::fabs(g_[index]);
      masked_gradient(g_, factor, float(spread), float(scale * alpha * teacher.tail), classes_);
    } else {
      even_gradient(g_, factor, float(spread + scale * alpha * teacher.tail), classes_);
    }
    if (soft && call_.indices) write_listed(alpha, teacher.tail);
    g_[label] -= float(scale * hard * (1.0 - smoothing));
    if (call_.logits_type != kFloat32) store(g_, call_.logits_type, classes_, grad_row());
  }

  void write_listed(double alpha, double tail) {
    const int64_t* indices = scratch_.indices.data();
    for (int64_t j = 0; j < call_.kept; ++j) g_[indices[j]] -= float(scale_ * alpha * (p_[j] - tail));
  }
};

// Counts the rows. Done before anything is written: in place, a bad row would cost the logits.
int check(const PSKDRows& call, int64_t& count) {
  count = 0;
  for (int64_t row = 0; row < call.rows; ++row) {
    const int64_t label = call.target[row];
    if (label != call.ignore_index) {
      if (label < 0 || label >= call.classes) return kBadLabel;
      ++count;
    }
    if (call.alpha_rows && !(call.alpha_rows[row] >= 0.0f && call.alpha_rows[row] <= 1.0f)) {
      return kBadAlpha;
    }
    for (int64_t j = 0; j < (call.indices ? call.kept : 0); ++j) {
      const int64_t index = call.indices[row * call.indices_stride + j];
      if (index < 0 || index >= call.classes) return kBadIndex;
    }
  }
  return kDone;
}

// Whether the caller knows this layout, and what is always read or written has an address.
bool is_sound(const PSKDRows& call) {
  if (call.size != sizeof(PSKDRows) || call.version != kVersion) return false;
  if (call.rows == 0) return call.loss || call.reduction == kNone;
  return call.loss && call.target && (call.logits || call.classes == 0);
}

int run(const PSKDRows& call) {
  if (!is_sound(call)) return kBadCall;
  int64_t count = 0;
  const int problem = check(call, count);
  if (problem != kDone) return problem;
  const double share = 1.0 / std::max<int64_t>(1, count);
  const double scale = call.gradient_is_of_mean ? share : 1.0;
  std::vector<float> reduced(call.reduction == kNone ? 0 : call.rows);
  float* loss = call.reduction == kNone ? call.loss : reduced.data();
  int failed = 0;
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
  {
    Scratch scratch;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < call.rows; ++row) {
      try {
        loss[row] = Row(call, row, scale, scratch).loss();
      } catch (const std::bad_alloc&) {
#pragma omp atomic write
        failed = kNoMemory;
      } catch (const OutOfRange& found) {
#pragma omp atomic write
        failed = found.problem;
      }
    }
  }
  if (failed) return failed;
  if (call.reduction == kNone) return kDone;
  double sum = 0.0;  // in the order of the rows, whatever the threads: the same to the last bit
  for (const float value : reduced) sum += value;
  *call.loss = float(call.reduction == kMean ? sum * share : sum);
  return kDone;
}

}  // namespace

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

// Asked before the first call: libraries of before there was a version do not have it.
extern "C" EXPORT int pskd_rows_version() { return kVersion; }

extern "C" EXPORT int pskd_rows(const PSKDRows* call) {
  try {
    return run(*call);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}
