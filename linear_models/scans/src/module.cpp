// Python binding: chooses the instruction set at run time and passes raw addresses on.
// linear_models/scans/cpu.py checks shapes, dtypes and strides; nothing here does.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <omp.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "call.h"

namespace nb = nanobind;

namespace kvthrift::scans {
extern const Scans scans_portable;
#if defined(__x86_64__)
extern const Scans scans_avx2, scans_avx512;
#endif

namespace {

std::vector<std::string> supported() {
  std::vector<std::string> names;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    names.push_back("avx512");
  if (avx2) names.push_back("avx2");
#endif
  names.push_back("portable");
  return names;
}

const Scans& table(const std::string& name) {
  for (const auto& known : supported()) {
    if (known != name) continue;
#if defined(__x86_64__)
    if (name == "avx512") return scans_avx512;
    if (name == "avx2") return scans_avx2;
#endif
    return scans_portable;
  }
  throw std::invalid_argument("this CPU does not support " + name);
}

using RowsArg = std::tuple<intptr_t, int64_t, int>;                      // address, stride, dtype
using StatesArg = std::tuple<intptr_t, int64_t, int64_t, int64_t, int>;  // strides of slot, row, item
using BatchArg = std::tuple<int, intptr_t, intptr_t, intptr_t>;

template <typename T>
T* address(intptr_t p) {
  return reinterpret_cast<T*>(p);
}

Rows rows(const RowsArg& r) {
  return {address<char>(std::get<0>(r)), std::get<1>(r), static_cast<Dtype>(std::get<2>(r))};
}

States states(const StatesArg& s) {
  return {address<char>(std::get<0>(s)), std::get<1>(s), std::get<2>(s), std::get<3>(s),
          static_cast<Dtype>(std::get<4>(s))};
}

Batch batch(const BatchArg& b) {
  return {std::get<0>(b), address<const int32_t>(std::get<1>(b)),
          address<const int32_t>(std::get<2>(b)), address<const uint8_t>(std::get<3>(b))};
}

int threads(int asked) { return asked > 0 ? asked : omp_get_max_threads(); }

void causal_conv(const std::string& isa, const BatchArg& b, const RowsArg& x, const RowsArg& out,
                 const StatesArg& s, intptr_t weight, intptr_t bias, int channels, int width,
                 bool activate, int num_threads) {
  const Conv call{batch(b), rows(x), rows(out), states(s), address<const float>(weight),
                  address<const float>(bias), channels, width, activate};
  table(isa).causal_conv(call, threads(num_threads));
}

void selective_scan(const std::string& isa, const BatchArg& bt, const RowsArg& x, const RowsArg& dt,
                    const RowsArg& b, const RowsArg& c, const RowsArg& gate, const RowsArg& out,
                    const StatesArg& s, intptr_t a, intptr_t d, intptr_t bias, int channels, int size,
                    int num_threads) {
  const SelectiveScan call{batch(bt), rows(x), rows(dt), rows(b), rows(c), rows(gate), rows(out),
                           states(s), address<const float>(a), address<const float>(d),
                           address<const float>(bias), channels, size};
  table(isa).selective_scan(call, threads(num_threads));
}

void wkv5(const std::string& isa, const BatchArg& b, const RowsArg& r, const RowsArg& k,
          const RowsArg& v, const RowsArg& out, const StatesArg& s, intptr_t decay, intptr_t bonus,
          int heads, int size, int num_threads) {
  const Wkv5 call{batch(b), rows(r), rows(k), rows(v), rows(out), states(s),
                  address<const float>(decay), address<const float>(bonus), heads, size};
  table(isa).wkv5(call, threads(num_threads));
}

void wkv7(const std::string& isa, const BatchArg& b, const std::vector<RowsArg>& r, const StatesArg& s,
          int heads, int size, int num_threads) {
  const Wkv7 call{batch(b), rows(r.at(0)), rows(r.at(1)), rows(r.at(2)), rows(r.at(3)), rows(r.at(4)),
                  rows(r.at(5)), rows(r.at(6)), states(s), heads, size};
  table(isa).wkv7(call, threads(num_threads));
}

void rg_lru(const std::string& isa, const BatchArg& b, const RowsArg& x, const RowsArg& input_gate,
            const RowsArg& gate, const RowsArg& out, const StatesArg& s, intptr_t rate, int channels,
            int num_threads) {
  const RgLru call{batch(b), rows(x), rows(input_gate), rows(gate), rows(out), states(s),
                   address<const float>(rate), channels};
  table(isa).rg_lru(call, threads(num_threads));
}

}  // namespace
}  // namespace kvthrift::scans

NB_MODULE(_scans, m) {
  using namespace kvthrift::scans;
  m.doc() = "Recurrences on CPUs; see linear_models/scans/cpu.py";
  m.def("supported", &supported, "Instruction sets this CPU runs, best first.");
  m.def("causal_conv", &causal_conv, nb::call_guard<nb::gil_scoped_release>());
  m.def("selective_scan", &selective_scan, nb::call_guard<nb::gil_scoped_release>());
  m.def("wkv5", &wkv5, nb::call_guard<nb::gil_scoped_release>());
  m.def("wkv7", &wkv7, nb::call_guard<nb::gil_scoped_release>());
  m.def("rg_lru", &rg_lru, nb::call_guard<nb::gil_scoped_release>());
}
