// Whether a plan is the one that its folder's manifest describes, and for this chip and TensorRT: asked before TensorRT
// is.
#ifndef MOSEAR_TRT_RUN_MANIFEST_H_
#define MOSEAR_TRT_RUN_MANIFEST_H_

#include <filesystem>
#include <string>

namespace mosear::run {

// What a plan needs, from `notes.plans.<file>` of manifest.json, which `mosear build` writes: {"module": "tensorrt",
// "version": "11.4.0.106", "compute_capabilities": ["9.0"], ...}.
struct Needs {
  std::string version;
};

// Compares the plan with its manifest and its capabilities with `capability` (90 for 9.0). Throws std::runtime_error
// with what was expected, what was found, and what to do.
Needs CheckPlan(const std::filesystem::path& plan, int capability);
// Throws unless TensorRT `found` (its three numbers) can load a plan of `needs`.
void CheckVersion(const std::filesystem::path& plan, const Needs& needs, const std::string& found);

}  // namespace mosear::run

#endif  // MOSEAR_TRT_RUN_MANIFEST_H_
