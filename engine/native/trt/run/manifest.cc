#include "manifest.h"

#include <fstream>
#include <sstream>
#include <stdexcept>

#include "json.h"
#include "sha256.h"

namespace mosear::run {
namespace {

constexpr int kFormat = 1;  // artifacts.FORMAT
constexpr char kModule[] = "tensorrt";
constexpr char kRemedy[] = ": build it again with `python export/build_engine.py`";

[[noreturn]] void Refuse(const std::filesystem::path& path, const std::string& why) {
  throw std::runtime_error(path.string() + " " + why + kRemedy);
}

Json Read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) Refuse(path, "is missing: a plan is loaded from its engine folder alone");
  std::stringstream text;
  text << file.rdbuf();
  try {
    return ParseJson(text.str());
  } catch (const std::runtime_error& error) {
    Refuse(path, std::string("cannot be read (") + error.what() + ")");
  }
}

}  // namespace

Needs CheckPlan(const std::filesystem::path& plan, int capability) {
  const std::string name = plan.filename().string();
  const std::filesystem::path path = plan.parent_path() / "manifest.json";
  const Json manifest = Read(path);
  if (manifest["kind"].text != "engine" || manifest["format"].number != kFormat) {
    Refuse(path, "holds '" + manifest["kind"].text + "', not an engine of format " + std::to_string(kFormat));
  }
  const std::string expected = manifest["files"][name].text;
  const Json& needs = manifest["notes"]["plans"][name];
  if (expected.empty() || needs.kind != Json::Kind::kObject) Refuse(path, "does not describe " + name);
  std::ifstream file(plan, std::ios::binary);
  if (!file) Refuse(plan, "cannot be opened");
  const std::string found = Sha256(file);
  if (found != expected) {
    Refuse(plan, "was altered: expected sha256 " + expected.substr(0, 12) + ", found " + found.substr(0, 12));
  }
  if (needs["module"].text != kModule) Refuse(plan, "is a plan of " + needs["module"].text + ", not of " + kModule);
  const std::string own = std::to_string(capability / 10) + "." + std::to_string(capability % 10);
  std::string listed;
  bool serves = false;
  for (const Json& each : needs["compute_capabilities"].list) {
    serves = serves || each.text == own;
    listed += (listed.empty() ? "" : ", ") + each.text;
  }
  if (!serves) Refuse(plan, "is for compute capability " + listed + ", this device is " + own);
  return Needs{needs["version"].text};
}

void CheckVersion(const std::filesystem::path& plan, const Needs& needs, const std::string& found) {
  // The manifest has four numbers, of the package that built; the library tells its first three.
  if (needs.version != found && needs.version.rfind(found + ".", 0) != 0) {
    Refuse(plan, "was built by TensorRT " + needs.version + ", here is " + found);
  }
}

}  // namespace mosear::run
