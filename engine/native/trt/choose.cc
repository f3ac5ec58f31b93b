#include "choose.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

namespace mosear::trt {
namespace {

constexpr double kSameNumber = 1e-6;
constexpr std::string_view kRows = "rows ";

bool Serves(const Kernel& kernel, const Variant& variant, const Wanted& wanted,
            const std::vector<Argument>& arguments) {
  for (const auto& [name, value] : wanted) {
    double found;
    if (!variant.Find(name, &found) || std::abs(found - value) > kSameNumber * std::max(1.0, std::abs(value)))
      return false;
  }
  for (size_t i = 0; i < kernel.parameter_count(); ++i) {
    if ((variant.aligned >> i & 1) != 0 && arguments[i].bits() % 16 != 0) return false;
  }
  return true;
}

// N of a label that ends in "rows N", else 0.
int64_t MostRows(std::string_view label) {
  const size_t at = label.rfind(kRows);
  int64_t found = 0;
  if (at != std::string_view::npos)
    std::from_chars(label.data() + at + kRows.size(), label.data() + label.size(), found);
  return found;
}

}  // namespace

const Kernel* Choose(const char* name, const char* data, const Wanted& wanted, const std::vector<Argument>& arguments,
                     int capability, int64_t rows, const Variant** variant, std::string* error) {
  const Kernel* best = nullptr;
  int64_t fewest = std::numeric_limits<int64_t>::max();
  for (const Kernel& kernel : Kernels()) {
    if (kernel.name() != name || kernel.data() != data || kernel.parameter_count() != arguments.size()) continue;
    const int64_t most = rows == 0 ? 0 : MostRows(kernel.label());
    if (most < rows || most >= fewest) continue;
    const Variant* found = kernel.Pick(capability);
    if (found == nullptr || !Serves(kernel, *found, wanted, arguments)) continue;
    best = &kernel;
    *variant = found;
    fewest = most;
  }
  if (best != nullptr) return best;
  *error = std::string("no binary of ") + name + " in " + data + " for compute capability " +
           std::to_string(capability) + " with";
  for (const auto& [constant, value] : wanted) *error += std::string(" ") + constant + "=" + std::to_string(value);
  *error += ": add it to the catalogue and build the library again";
  return nullptr;
}

int64_t ConstantOf(const Variant& variant, const char* name) {
  double found = 0;
  return variant.Find(name, &found) ? static_cast<int64_t>(found) : 0;
}

}  // namespace mosear::trt
