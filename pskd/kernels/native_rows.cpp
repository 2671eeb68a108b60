// Loss, NLL and gradient of rows of logits against softened labels, for CPUs.
//
// Each row is worked on while it is in cache: past prediction, from a memory's record if there is one;
// largest logit; exponentials and sums; the new record; gradient. It is plain C++ behind a C function,
// so that it is compiled without torch and serves any version of it. The contracts are those of
// pskd/kernels/rows.py and pskd/memory/records.py.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
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

EACH_PROCESSOR int32_t place_of_largest(const float* p, int32_t n) {
  float most = -kInfinity;
#pragma omp simd reduction(max : most)
  for (int32_t i = 0; i < n; ++i) most = p[i] > most ? p[i] : most;
  int32_t place = n;
#pragma omp simd reduction(min : place)
  for (int32_t i = 0; i < n; ++i) place = p[i] == most && i < place ? i : place;
  return place == n ? 0 : place;  // all NaN
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

// The sum of z - max, which label smoothing needs.
EACH_PROCESSOR void shifted_sum(const float* z, float max, int64_t n, Sums& sums) {
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(n, start + kBlock);
    float shifted = 0.0f, infinite = 0.0f;
#pragma omp simd reduction(+ : shifted, infinite)
    for (int64_t i = start; i < end; ++i) {
      const float t = z[i] - max;
      shifted += t == -kInfinity ? 0.0f : t;
      infinite += t == -kInfinity ? 1.0f : 0.0f;
    }
    sums.shifted += shifted;
    sums.infinite += infinite;
  }
}

// Sums of exp(z - max), which are left in e, and of a teacher's probabilities; e may be z.
EACH_PROCESSOR void dense_sums(const float* z, float max, const float* p, int64_t n, float* e,
                               Sums& sums) {
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(n, start + kBlock);
    float exps = 0.0f, probs = 0.0f, dot = 0.0f;
#pragma omp simd reduction(+ : exps, probs, dot)
    for (int64_t i = start; i < end; ++i) {
      const float t = z[i] - max, x = exp_nonpositive(t);
      e[i] = x;
      exps += x;
      probs += p[i];
      dot += p[i] == 0.0f ? 0.0f : p[i] * t;  // 0 * -infinity is 0 here
    }
    sums.exps += exps;
    sums.probs += probs;
    sums.dot += dot;
  }
}

constexpr int64_t kLanes = 16;

// The largest of each block of a multiple of kLanes numbers.
EACH_PROCESSOR void block_maxima(const float* e, int64_t n, int64_t block, float* most) {
  for (int64_t start = 0; start < n; start += block) {
    float lanes[kLanes];
    std::fill(lanes, lanes + kLanes, -kInfinity);
    const int64_t end = std::min(n, start + block), whole = start + (end - start) / kLanes * kLanes;
    for (int64_t i = start; i < whole; i += kLanes) {
#pragma omp simd
      for (int64_t j = 0; j < kLanes; ++j) lanes[j] = e[i + j] > lanes[j] ? e[i + j] : lanes[j];
    }
    for (int64_t i = whole; i < end; ++i) lanes[0] = std::max(lanes[0], e[i]);
    float m = lanes[0];
#pragma omp simd reduction(max : m)
    for (int64_t j = 0; j < kLanes; ++j) m = lanes[j] > m ? lanes[j] : m;
    *most++ = m;
  }
}

// What k_largest needs.
struct Selection {
  std::vector<float> most, sorted;
  std::vector<int32_t> places;
};

// The places of the k largest, in falling order. At least k numbers are not below the k-th largest
// of the blocks' maxima, and hardly more: only these are sorted.
const int32_t* k_largest(const float* e, int64_t n, int64_t k, Selection& made) {
  const int64_t block = std::clamp<int64_t>(n / (4 * k) / kLanes * kLanes, kLanes, 8 * kLanes);
  made.most.resize((n + block - 1) / block);
  block_maxima(e, n, block, made.most.data());
  float least = -kInfinity;
  if (k <= int64_t(made.most.size())) {
    made.sorted = made.most;
    std::nth_element(made.sorted.begin(), made.sorted.begin() + (k - 1), made.sorted.end(),
                     std::greater<float>());
    least = made.sorted[k - 1];
  }
  made.places.clear();
  for (size_t b = 0; b < made.most.size(); ++b) {
    if (made.most[b] < least) continue;  // the usual case
    const int64_t end = std::min<int64_t>(n, (b + 1) * block);
    for (int64_t i = b * block; i < end; ++i) {
      if (e[i] >= least) made.places.push_back(int32_t(i));
    }
  }
  std::partial_sort(made.places.begin(), made.places.begin() + k, made.places.end(),
                    [e](int32_t a, int32_t b) { return e[a] != e[b] ? e[a] > e[b] : a < b; });
  return made.places.data();
}

// Exponentials times a scale; those that are marked by -0 become 0.
EACH_PROCESSOR void probabilities(const float* e, float scale, int64_t n, float* p) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) p[i] = e[i] * scale + 0.0f;
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
  // A memory's records.
  const int64_t* numbers;  // of each row's record, distinct; null: no memory
  const uint8_t* past;     // in place of a teacher: a row without a record does not learn; may be null
  uint8_t* present;        // takes what the rows predict now
  int64_t records, spare, record_bytes, record_width;  // spare: number of rows without a record
  int32_t record_type, index_bytes;  // of an index; 0: dense
  int32_t has_spare, unused;         // else each row has a record
  float* alphas;                     // of each row, as it was used; may be null
  double* effect;                    // kEffects sums of `Effect`, which are added to; may be null
};

enum { kVersion = 5 };
enum { kDone = 0, kBadLabel, kBadAlpha, kBadIndex, kNoMemory, kBadCall, kBadNumber };  // returned

}  // extern "C"

namespace {

// What a thread needs to convert and to keep a row: nothing of the size of the batch.
struct Scratch {
  std::vector<float> z, p, values;
  std::vector<int64_t> indices;
  std::vector<uint8_t> record;  // aligned, as a record in a table is not
  Selection selection;
};

// What the teacher did to a row, in the order of pskd/stats.py.
enum { kRows = 0, kTeacherNll, kError, kRemoved, kAgreed, kEffects };

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

// A record: indices unless dense, probabilities, and a byte that is 0 where nothing was written.
class Records {
 public:
  explicit Records(const PSKDRows& call) : call_(call) {}

  static bool written(const uint8_t* record, int64_t bytes) { return record[bytes - 1] != 0; }

  bool has(int64_t row) const {
    return call_.numbers && !(call_.has_spare && call_.numbers[row] == call_.spare);
  }

  // Reads the past prediction of a row; returns whether there is one.
  bool read(int64_t row, Scratch& scratch) const {
    if (!call_.past || !has(row)) return false;
    const uint8_t* record = call_.past + call_.numbers[row] * call_.record_bytes;
    if (!written(record, call_.record_bytes)) return false;
    scratch.record.assign(record, record + call_.record_bytes);
    const int64_t width = call_.record_width, start = width * call_.index_bytes;
    if (call_.index_bytes) {
      scratch.indices.resize(width);
      for (int64_t j = 0; j < width; ++j) scratch.indices[j] = index(scratch.record.data(), j);
    }
    scratch.p.resize(width);
    if (call_.record_type == kFloat32) {
      std::memcpy(scratch.p.data(), scratch.record.data() + start, 4 * width);
    } else {
      load(scratch.record.data() + start, call_.record_type, width, scratch.p.data());
    }
    return true;
  }

  int64_t index(const uint8_t* record, int64_t j) const {
    if (call_.index_bytes == 2) {
      uint16_t value;
      std::memcpy(&value, record + 2 * j, 2);
      return value;
    }
    int32_t value;
    std::memcpy(&value, record + 4 * j, 4);
    return value;
  }

  // Keeps the softmax e / sum of a row; one that is not finite is not kept.
  void write(int64_t row, const float* e, double sum, Scratch& scratch) const {
    const int64_t bytes = call_.record_bytes, width = call_.record_width;
    const int64_t start = width * call_.index_bytes;
    const bool kept = std::isfinite(sum) && sum > 0.0;
    const float scale = kept ? float(1.0 / sum) : 0.0f;
    scratch.record.assign(bytes, 0);
    uint8_t* made = scratch.record.data();
    scratch.values.resize(width);
    float* values = scratch.values.data();
    if (call_.index_bytes && kept) {
      const int32_t* places = k_largest(e, call_.classes, width, scratch.selection);
      for (int64_t j = 0; j < width; ++j) {
        values[j] = e[places[j]];
        put_index(places[j], made + j * call_.index_bytes);
      }
      e = values;
    }
    if (kept) {
      probabilities(e, scale, width, values);
      if (call_.record_type == kFloat32) std::memcpy(made + start, values, 4 * width);
      else store(values, call_.record_type, width, made + start);
    }
    // Killed in between, a process leaves a row that was not written, and not a torn one.
    uint8_t* record = call_.present + call_.numbers[row] * bytes;
    record[bytes - 1] = 0;
    std::atomic_signal_fence(std::memory_order_seq_cst);
    std::memcpy(record, made, bytes - 1);
    std::atomic_signal_fence(std::memory_order_seq_cst);
    record[bytes - 1] = kept;
  }

 private:
  const PSKDRows& call_;

  void put_index(int32_t index, uint8_t* to) const {
    const uint16_t narrow = uint16_t(index);
    if (call_.index_bytes == 2) std::memcpy(to, &narrow, 2);
    else std::memcpy(to, &index, 4);
  }
};

class Row {
 public:
  // `effect` is of this row, or null.
  Row(const PSKDRows& call, int64_t row, double scale, Scratch& scratch, double* effect)
      : call_(call), records_(call), row_(row), classes_(call.classes), scale_(scale),
        scratch_(scratch), effect_(effect) {}

  float loss() {
    const int64_t label = call_.target[row_];
    if (label == call_.ignore_index) {
      if (records_.has(row_)) remember();
      ignore();
      return 0.0f;
    }
    if (label < 0 || label >= classes_) throw OutOfRange{kBadLabel};
    const bool has_past = records_.read(row_, scratch_);
    double alpha = call_.alpha_rows ? call_.alpha_rows[row_] : call_.alpha;
    if (call_.past && !has_past) alpha = 0.0;
    if (call_.alphas) call_.alphas[row_] = float(alpha);
    z_ = as_float(call_.logits, call_.logits_type, row_ * call_.logits_stride, classes_, scratch_.z);
    g_ = exponentials_row();
    max_ = largest(z_, classes_);
    const double label_shifted = z_[label] - max_;
    const double smoothing = call_.label_smoothing, hard = 1.0 - alpha;
    const bool wanted = alpha != 0.0 || call_.teacher_at_label;
    const bool soft = (call_.teacher || has_past) && wanted;
    const bool is_sparse = call_.past ? call_.index_bytes != 0 : call_.indices != nullptr;
    Teacher teacher;
    if (!soft) {
      student_sums(z_, max_, classes_, g_, sums_);
    } else if (is_sparse) {
      teacher = sparse(label);
    } else {
      teacher = dense(label);
    }
    if (records_.has(row_)) records_.write(row_, g_, sums_.exps, scratch_);
    const double at_label = g_[label], lse = std::log(sums_.exps);
    const double nll = lse - label_shifted;
    const double even = sums_.infinite > 0 ? kInfinity : lse - sums_.shifted / classes_;
    const double soft_loss = teacher.mass * lse - teacher.expectation;
    if (call_.nll) call_.nll[row_] = float(nll);
    if (call_.teacher_at_label) call_.teacher_at_label[row_] = float(teacher.at_label);
    if (effect_ && alpha > 0.0) note_effect(alpha, 1.0 - at_label / sums_.exps, teacher.at_label);
    if (call_.grad) write_gradient(alpha, soft && alpha != 0.0, is_sparse, teacher, label);
    return float(weighted(hard * (1.0 - smoothing), nll) + weighted(hard * smoothing, even) +
                 weighted(alpha, soft_loss));
  }

 private:
  const PSKDRows& call_;
  const Records records_;
  const int64_t row_, classes_;
  const double scale_;  // of the gradient
  Scratch& scratch_;
  double* const effect_;
  bool agrees_ = false;  // the student's best class is the teacher's; known where there is an effect
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

  // A row that does not count is kept like every other.
  void remember() {
    z_ = as_float(call_.logits, call_.logits_type, row_ * call_.logits_stride, classes_, scratch_.z);
    scratch_.z.resize(classes_);
    student_sums(z_, largest(z_, classes_), classes_, scratch_.z.data(), sums_);
    records_.write(row_, scratch_.z.data(), sums_.exps, scratch_);
  }

  void ignore() {
    if (call_.nll) call_.nll[row_] = 0.0f;
    if (call_.teacher_at_label) call_.teacher_at_label[row_] = 1.0f;
    if (call_.alphas) call_.alphas[row_] = 0.0f;
    if (call_.grad) std::memset(grad_row(), 0, classes_ * (call_.logits_type == kFloat32 ? 4 : 2));
  }

  Teacher dense(int64_t label) {
    p_ = teacher_row(classes_);
    if (effect_) agrees_ = z_[place_of_largest(p_, int32_t(classes_))] == max_;
    if (call_.teacher_is_logits) {
      const float max = largest(p_, classes_);
      scratch_.p.resize(classes_);
      exponentials(p_, max, classes_, scratch_.p.data());
      p_ = scratch_.p.data();
    }
    if (call_.label_smoothing != 0.0) shifted_sum(z_, max_, classes_, sums_);
    dense_sums(z_, max_, p_, classes_, g_, sums_);
    if (call_.teacher_is_logits) q_sum_ = sums_.probs;
    // Rounded to half precision the parts of a whole are not quite a whole.
    if (call_.past) q_sum_ = std::max(sums_.probs, double(std::numeric_limits<float>::min()));
    return {p_[label] / q_sum_, sums_.probs / q_sum_, sums_.dot / q_sum_, 0.0};
  }

  Teacher sparse(int64_t label) {
    const int64_t kept = call_.past ? call_.record_width : call_.kept;
    const int64_t* indices = checked_indices(kept);
    p_ = teacher_row(kept);
    if (call_.past) divide_by_mass(kept);
    if (effect_) agrees_ = z_[indices[place_of_largest(p_, int32_t(kept))]] == max_;
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

  // A row of what the teacher was given as; a record has been read.
  const float* teacher_row(int64_t n) {
    if (call_.past) return scratch_.p.data();
    return as_float(call_.teacher, call_.teacher_type, row_ * call_.teacher_stride, n, scratch_.p);
  }

  // Rounded to half precision the listed parts may be more than a whole.
  void divide_by_mass(int64_t kept) {
    float mass = 0.0f;
    for (const float p : scratch_.p) mass += p;
    mass = std::max(mass, kept == classes_ ? std::numeric_limits<float>::min() : 1.0f);
    for (float& p : scratch_.p) p /= mass;
  }

  void note_effect(double alpha, double error, double at_label) {
    const double removed = alpha * (1.0 - at_label);
    if (!std::isfinite(error) || !std::isfinite(removed)) return;  // of a step that overflowed
    effect_[kRows] = 1.0;
    effect_[kTeacherNll] = -std::log(std::max(float(at_label), std::numeric_limits<float>::min()));
    effect_[kError] = error;
    effect_[kRemoved] = removed;
    effect_[kAgreed] = agrees_;
  }

  // A copy: what was checked is what is used, whoever writes to the original.
  const int64_t* checked_indices(int64_t kept) {
    if (!call_.past) {
      const int64_t* given = call_.indices + row_ * call_.indices_stride;
      scratch_.indices.assign(given, given + kept);
    }
    for (const int64_t index : scratch_.indices) {
      if (index < 0 || index >= classes_) throw OutOfRange{kBadIndex};
    }
    return scratch_.indices.data();
  }

  void write_gradient(double alpha, bool soft, bool is_sparse, const Teacher& teacher,
                      int64_t label) {
    const double scale = scale_, hard = 1.0 - alpha, smoothing = call_.label_smoothing;
    const double mass = hard + (soft ? alpha * teacher.mass : 0.0);
    const float factor = float(scale * mass / sums_.exps);
    const double spread = scale * hard * smoothing / classes_;
    if (soft && !is_sparse) {
      dense_gradient(g_, g_, factor, p_, float(scale * alpha / q_sum_), float(spread), classes_);
    } else if (soft && masked_ > 0.0) {
      // A listed class is given the tail like every other here, and its own share below.
      for (const int64_t index : scratch_.indices) g_[index] = std::fabs(g_[index]);
      masked_gradient(g_, factor, float(spread), float(scale * alpha * teacher.tail), classes_);
    } else {
      even_gradient(g_, factor, float(spread + scale * alpha * teacher.tail), classes_);
    }
    if (soft && is_sparse) write_listed(alpha, teacher.tail);
    g_[label] -= float(scale * hard * (1.0 - smoothing));
    if (call_.logits_type != kFloat32) store(g_, call_.logits_type, classes_, grad_row());
  }

  void write_listed(double alpha, double tail) {
    const std::vector<int64_t>& indices = scratch_.indices;
    for (size_t j = 0; j < indices.size(); ++j) {
      g_[indices[j]] -= float(scale_ * alpha * (p_[j] - tail));
    }
  }
};

// Whether each row has a record of its own, and what is listed in those that are read are classes.
int check_records(const PSKDRows& call) {
  std::vector<int64_t> numbers;
  const Records records(call);
  for (int64_t row = 0; row < call.rows; ++row) {
    const int64_t number = call.numbers[row];
    if (!records.has(row)) continue;
    if (number < 0 || number >= call.records) return kBadNumber;
    numbers.push_back(number);
    if (!call.past || !call.index_bytes) continue;
    const uint8_t* record = call.past + number * call.record_bytes;
    if (!Records::written(record, call.record_bytes)) continue;
    for (int64_t j = 0; j < call.record_width; ++j) {
      const int64_t index = records.index(record, j);
      if (index < 0 || index >= call.classes) return kBadIndex;
    }
  }
  std::sort(numbers.begin(), numbers.end());
  const bool twice = std::adjacent_find(numbers.begin(), numbers.end()) != numbers.end();
  return twice ? kBadNumber : kDone;
}

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
  return call.numbers ? check_records(call) : kDone;
}

// Whether the caller knows this layout, and what is always read or written has an address.
bool is_sound(const PSKDRows& call) {
  if (call.size != sizeof(PSKDRows) || call.version != kVersion) return false;
  if (call.rows == 0) return call.loss || call.reduction == kNone;
  if (!call.loss || !call.target || (!call.logits && call.classes > 0)) return false;
  if (!call.numbers) return true;
  const int64_t size = call.index_bytes + (call.record_type == kFloat32 ? 4 : 2);
  const bool fits = call.index_bytes ? call.record_width <= call.classes
                                     : call.record_width == call.classes;
  return call.present && fits && call.record_bytes == call.record_width * size + 1;
}

int run(const PSKDRows& call) {
  if (!is_sound(call)) return kBadCall;
  int64_t count = 0;
  const int problem = check(call, count);
  if (problem != kDone) return problem;
  const double share = 1.0 / std::max<int64_t>(1, count);
  const double scale = call.gradient_is_of_mean ? share : 1.0;
  std::vector<float> reduced(call.reduction == kNone ? 0 : call.rows);
  std::vector<double> effects(call.effect ? kEffects * call.rows : 0);
  float* loss = call.reduction == kNone ? call.loss : reduced.data();
  int failed = 0;
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
  {
    Scratch scratch;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < call.rows; ++row) {
      try {
        double* effect = call.effect ? &effects[kEffects * row] : nullptr;
        loss[row] = Row(call, row, scale, scratch, effect).loss();
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
  // In the order of the rows, whatever the threads: the same to the last bit.
  for (size_t i = 0; i < effects.size(); ++i) call.effect[i % kEffects] += effects[i];
  if (call.reduction == kNone) return kDone;
  double sum = 0.0;
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
