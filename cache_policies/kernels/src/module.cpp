// Python binding: chooses the instruction set at run time and passes raw addresses on.
// cache_policies/kernels/cpu.py checks shapes, dtypes and strides; nothing here does.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <omp.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "call.h"

namespace nb = nanobind;

namespace kvthrift {
extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512bf16, kernels_amx;
#endif

namespace {

#if defined(__x86_64__)
// Whether the CPU has AMX with bfloat16, and the system lets this process use it: Linux saves its
// registers only for processes that have asked.
bool may_use_amx() {
  const unsigned bf16 = 1u << 22, tile = 1u << 24;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bf16) == 0 || (d & tile) == 0) return false;
#if defined(__linux__)
  const int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

std::vector<std::string> supported() {
  std::vector<std::string> names;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  // Intel's `vdpbf16ps` is slower than its multiplication of floats, AMD's is twice as fast.
  const bool slow_bf16 = __builtin_cpu_is("intel");
  if (bf16 && may_use_amx()) names.push_back("amx");
  if (bf16 && !slow_bf16) names.push_back("avx512bf16");
  if (avx512) names.push_back("avx512");
  if (bf16 && slow_bf16) names.push_back("avx512bf16");
  if (avx2) names.push_back("avx2");
#endif
  names.push_back("portable");
  return names;
}

const Kernels& table(const std::string& name) {
#if defined(__x86_64__)
  if (name == "amx" && may_use_amx()) return kernels_amx;
  if (name == "avx512bf16") return kernels_avx512bf16;
  if (name == "avx512") return kernels_avx512;
  if (name == "avx2") return kernels_avx2;
#endif
  if (name == "portable") return kernels_portable;
  throw std::invalid_argument("unknown instruction set " + name);
}

template <typename T>
T* address(intptr_t p) {
  return reinterpret_cast<T*>(p);
}

// One layer's kernel: fixed layout and shape, called every step.
class Layer {
 public:
  Layer(const std::string& isa, const Layout& layout, int dtype, int num_heads, int num_kv_heads,
        float scale, float soft_cap, intptr_t sinks, bool rounding, intptr_t key_offset)
      : kernels_(table(isa)) {
    bool found = false;
    for (const auto& name : supported()) found = found || name == isa;
    if (!found) throw std::invalid_argument("this CPU does not support " + isa);
    call_.layout = layout;
    call_.dtype = call_.fresh_dtype = static_cast<Dtype>(dtype);
    call_.num_heads = num_heads;
    call_.num_kv_heads = num_kv_heads;
    call_.scale = scale;
    call_.key_offset = address<const float>(key_offset);
    call_.soft_cap = soft_cap;
    call_.sinks = address<const float>(sinks);
    call_.rounding = rounding;
  }

  void set_batch(int num_seqs, intptr_t query_start, intptr_t stored, intptr_t ring,
                 intptr_t stored_after, intptr_t appended, intptr_t store_row, intptr_t block_table,
                 int64_t row_stride, intptr_t slots, int64_t slot_row) {
    call_.batch = Batch{num_seqs,
                        address<const int32_t>(query_start),
                        address<const int32_t>(stored),
                        address<const int32_t>(ring),
                        address<const int32_t>(stored_after),
                        address<const int32_t>(appended),
                        address<const int32_t>(store_row),
                        address<const int32_t>(block_table),
                        row_stride,
                        address<const int32_t>(slots),
                        slot_row};
  }

  // what was set is where the tokens of `move` are; a batch that is set next says where they go
  void set_source() { source_ = call_.batch; }

  void set_pages(intptr_t pages, int64_t page_stride, int64_t head_stride) {
    call_.pages = address<uint8_t>(pages);
    call_.page_stride = page_stride;
    call_.head_stride = head_stride;
  }

  // addresses of 0: no mass is counted, all pages are read
  void set_options(intptr_t first_query, intptr_t first_token, intptr_t place, intptr_t out, int64_t stride,
                   intptr_t reads, intptr_t read_count, intptr_t read_first, int64_t read_width,
                   int read_block) {
    call_.mass = {address<const int32_t>(first_query), address<const int32_t>(first_token),
                  address<const int32_t>(place), address<float>(out), stride};
    call_.reads = {address<const int32_t>(reads), address<const int32_t>(read_count),
                   address<const int32_t>(read_first), read_width, read_block};
  }

  void attend(intptr_t query, int64_t query_stride, intptr_t key, int64_t key_stride, intptr_t value,
              int64_t value_stride, intptr_t output, int64_t output_stride, int num_threads) {
    set_tensors(key, key_stride, value, value_stride, num_threads);
    call_.query = {address<char>(query), query_stride};
    call_.output = {address<char>(output), output_stride};
    if (!kernels_.attend(call_)) throw std::bad_alloc();
  }

  void page_mass(intptr_t query, int64_t query_stride, intptr_t key, int64_t key_stride, intptr_t blocks,
                 int count, int samples, intptr_t mass, intptr_t rest, int64_t width, int num_threads) {
    set_tensors(key, key_stride, 0, 0, num_threads);
    call_.query = {address<char>(query), query_stride};
    call_.reads = {};
    const PageMass wanted = {address<const int32_t>(blocks), count, samples, address<float>(mass),
                             address<float>(rest), width};
    if (!kernels_.page_mass(call_, wanted)) throw std::bad_alloc();
  }

  void append(intptr_t key, int64_t key_stride, intptr_t value, int64_t value_stride, int num_threads) {
    set_tensors(key, key_stride, value, value_stride, num_threads);
    kernels_.append(call_);
  }

  void read(intptr_t key, int64_t key_stride, intptr_t value, int64_t value_stride, intptr_t index,
            intptr_t start, int64_t count, intptr_t key_out, intptr_t value_out, int num_threads) {
    set_tensors(key, key_stride, value, value_stride, num_threads);
    kernels_.read(call_, moved(index, start, count, key_out, value_out));
  }

  void write(intptr_t index, intptr_t start, int64_t count, intptr_t key, intptr_t value, int num_threads) {
    set_tensors(0, 0, 0, 0, num_threads);
    kernels_.write(call_, moved(index, start, count, key, value));
  }

  void move(intptr_t key, int64_t key_stride, intptr_t value, int64_t value_stride, intptr_t index, intptr_t number,
            intptr_t start, int64_t count, int num_threads) {
    set_tensors(key, key_stride, value, value_stride, num_threads);
    Call source = call_;
    source.batch = source_;
    Moved tokens = moved(index, start, count, 0, 0);
    tokens.number = address<const int32_t>(number);
    if (!kernels_.move(call_, source, tokens)) throw std::bad_alloc();
  }

 private:
  static Moved moved(intptr_t index, intptr_t start, int64_t count, intptr_t key, intptr_t value) {
    return {address<const int32_t>(index), address<const int32_t>(start), count, address<float>(key),
            address<float>(value), nullptr};
  }

  void set_tensors(intptr_t key, int64_t key_stride, intptr_t value, int64_t value_stride, int threads) {
    call_.key = {address<char>(key), key_stride};
    call_.value = {address<char>(value), value_stride};
    call_.num_threads = threads > 0 ? threads : omp_get_max_threads();
  }

  const Kernels& kernels_;
  Call call_{};
  Batch source_{};
};

Layout make_layout(int kind, int store_dtype, int ring_dtype, int head_size, int page_tokens,
                   int ring_tokens, int ring_pages, int k_bits, int v_bits, int group,
                   bool keys_per_channel, int rotation, int64_t key, int64_t key_scale, int64_t key_min,
                   int64_t value, int64_t value_scale, int64_t value_min, int64_t run_bytes) {
  return Layout{static_cast<Kind>(kind), static_cast<Dtype>(store_dtype),
                static_cast<Dtype>(ring_dtype), head_size, page_tokens, ring_tokens, ring_pages,
                k_bits, v_bits, group, keys_per_channel, rotation, key, key_scale, key_min, value,
                value_scale, value_min, run_bytes};
}

}  // namespace
}  // namespace kvthrift

NB_MODULE(_cpu, m) {
  using namespace kvthrift;
  using namespace nb::literals;
  m.doc() = "Attention over compressed pages on CPUs; see cache_policies/kernels/cpu.py";
  m.def("supported", &supported, "Instruction sets this CPU runs, best first.");
  nb::class_<Layout>(m, "Layout");
  m.def("layout", &make_layout, nb::kw_only(), "kind"_a, "store_dtype"_a, "ring_dtype"_a,
        "head_size"_a, "page_tokens"_a, "ring_tokens"_a, "ring_pages"_a, "k_bits"_a, "v_bits"_a,
        "group"_a, "keys_per_channel"_a, "rotation"_a, "key"_a, "key_scale"_a, "key_min"_a, "value"_a,
        "value_scale"_a, "value_min"_a, "run_bytes"_a);
  nb::class_<Layer>(m, "Layer")
      .def(nb::init<const std::string&, const Layout&, int, int, int, float, float, intptr_t, bool, intptr_t>(),
           "isa"_a, "layout"_a, "dtype"_a, "num_heads"_a, "num_kv_heads"_a, "scale"_a, "soft_cap"_a,
           "sinks"_a, "rounding"_a, "key_offset"_a)
      .def("set_batch", &Layer::set_batch)
      .def("set_source", &Layer::set_source)
      .def("set_pages", &Layer::set_pages)
      .def("set_options", &Layer::set_options)
      .def("attend", &Layer::attend, nb::call_guard<nb::gil_scoped_release>())
      .def("page_mass", &Layer::page_mass, nb::call_guard<nb::gil_scoped_release>())
      .def("append", &Layer::append, nb::call_guard<nb::gil_scoped_release>())
      .def("read", &Layer::read, nb::call_guard<nb::gil_scoped_release>())
      .def("write", &Layer::write, nb::call_guard<nb::gil_scoped_release>())
      .def("move", &Layer::move, nb::call_guard<nb::gil_scoped_release>());
}
