// The Python module: its parts, the choice of the instruction set, and the translation of errors. What each function
// computes is said in awq_ext/kernels/reference.
#include "adapters/bindings.h"

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "drivers/choice.h"
#include "drivers/tile_probe.h"
#include "kernels/isa.h"
#include "kernels/processor.h"
#include "kernels/tile_check.h"

namespace awq {
namespace {

std::pair<std::string, std::string> named(const DefaultIsa& d) { return {isa_name(d.isa), d.reason}; }

void bind_isa(py::module_& m) {
  m.def("isa", [] { return isa_name(current_isa()); }, "Name of the instruction set whose kernels run.");
  m.def("set_isa", &set_isa, py::arg("name"),
        "Use the kernels of another instruction set, in the whole process. ValueError if this processor lacks it.");
  m.def(
      "available_isas",
      [] {
        std::vector<std::string> names;
        for (Isa isa : available_isas()) names.emplace_back(isa_name(isa));
        return names;
      },
      "Names of the instruction sets that this build and this processor have, the least first.");
  m.def(
      "default_isa", [] { return named(default_isa()); },
      "The instruction set that is chosen for this processor where nothing else is asked for, and why.");
  m.def(
      "default_isa_on",
      [](const std::string& vendor, bool avx2, bool avx512, bool avx512_vnni, bool avx512_bf16, bool amx, bool agree) {
        const Processor made_up{vendor, 0, 0, avx2, avx512, avx512_vnni, avx512_bf16, amx};
        const auto yes = [](const KernelTable&, const KernelTable&) { return true; };
        const auto no = [](const KernelTable&, const KernelTable&) { return false; };
        return named(default_isa(agree ? Machine{made_up, yes} : Machine{made_up, no}));
      },
      py::arg("vendor"), py::kw_only(), py::arg("avx2") = false, py::arg("avx512") = false,
      py::arg("avx512_vnni") = false, py::arg("avx512_bf16") = false, py::arg("amx") = false,
      py::arg("tiles_agree") = false,
      "The same for a processor that need not be at hand, of this build's architecture; tiles_agree: whether its AMX "
      "tiles compute what their plain form does.");
}

void bind_choices(py::module_& m) {
  m.def(
      "processor", [] { return std::tuple(processor().vendor, processor().family, processor().model); },
      "Vendor, family and model of the processor, as CPUID says them; ('', 0, 0) where there is no CPUID.");
  m.def(
      "choices",
      [] {
        std::vector<std::tuple<std::string, std::string, std::string>> lines;
        for (const Job& job : describe_choices(kernels())) lines.emplace_back(job.job, job.kernel, job.reason);
        return lines;
      },
      "What the instruction set in use computes each job with, and why: (job, kernel, reason).");
#if defined(__x86_64__)
  m.def(
      "emulated_tiles_agree", [] { return tiles_agree(kAmxEmulatedKernels, kAmxPlainKernels); },
      "Run the check that decides whether AMX is used on the two emulations of it; needs AVX-512 with VNNI.");
#endif
  m.def(
      "probe_tiles",
      [](int milliseconds) {
        py::gil_scoped_release release;
        const TileProbe probe = probe_tiles(kernels(), milliseconds);
        return std::tuple(probe.holds, probe.preempted, probe.damaged);
      },
      py::arg("milliseconds"),
      "Hold tile registers while other threads take the processor away: (holds, preempted ones, damaged ones); zeros "
      "where the instruction set in use has no tiles.");
}

// c10's errors carry the C++ stack; Python gets only the message.
void translate_errors(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const c10::TypeError& e) {
    py::set_error(PyExc_TypeError, e.what_without_backtrace());
  } catch (const c10::ValueError& e) {
    py::set_error(PyExc_ValueError, e.what_without_backtrace());
  }
}

}  // namespace
}  // namespace awq

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "C++ kernels of awq_ext. The functions mirror awq_ext.kernels.reference, for tensors on the CPU.";
  py::register_local_exception_translator(&awq::translate_errors);
  awq::current_isa();  // an AWQ_EXT_ISA that is not available raises at import, not in the middle of a run
  awq::bind_isa(m);
  awq::bind_choices(m);
  awq::bind_quantize(m);
  awq::bind_tiles(m);
  awq::bind_search(m);
  awq::bind_gptq(m);
  awq::bind_refine(m);
  awq::bind_learned(m);
  awq::bind_stats(m);
  awq::bind_cuda(m);
}
