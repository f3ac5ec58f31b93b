// The plugin library as TensorRT would use it, up to the device: plugin_test LIBRARY. The driver is a stand-in.
#include <NvInfer.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../../mock/mock_cuda.h"
#include "../attention.h"

using namespace nvinfer1;

namespace {

int failures = 0;

void Expect(bool holds, const char* what, int line) {
  if (holds) return;
  std::printf("line %d: %s\n", line, what);
  ++failures;
}
#define EXPECT(condition) Expect(condition, #condition, __LINE__)

// Stands in for TensorRT's dimensions: each is a number.
class Number final : public IDimensionExpr, public apiv::VDimensionExpr {
 public:
  explicit Number(int64_t value) : value_(value) { mImpl = this; }
  ~Number() noexcept override = default;
  bool isConstant() const override { return true; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }

 private:
  int64_t value_;
};

class Numbers final : public IExprBuilder, public apiv::VExprBuilder {
 public:
  Numbers() { mImpl = this; }
  ~Numbers() noexcept override = default;
  const IDimensionExpr* constant(int64_t value) override {
    made_.push_back(std::make_unique<Number>(value));
    return made_.back().get();
  }
  const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&, const IDimensionExpr&) override {
    return nullptr;
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
    return nullptr;
  }

 private:
  std::vector<std::unique_ptr<Number>> made_;
};

class Words final : public ILogger, public ILoggerFinder {
 public:
  void log(Severity, const char* text) noexcept override { last = text; }
  ILogger* findLogger() override { return this; }
  std::string last;
};

constexpr int64_t kBatch = 3, kHeads = 9, kKvHeads = 3, kSize = 64, kCapacity = 1024, kGroups = 3;

std::vector<Dims> Shapes(int64_t rows) {
  return {Dims4(kBatch, kHeads, rows, kSize),
          Dims4(kBatch, kKvHeads, kCapacity, kSize),
          Dims4(kBatch, kKvHeads, kCapacity, kSize),
          Dims2(kBatch, kCapacity),
          Dims2(kBatch, rows),
          Dims{1, {kBatch}},
          Dims{1, {kBatch}},
          Dims2(kHeads, 8),
          Dims{1, {kBatch}},
          Dims2(kBatch, kGroups),
          Dims4(kBatch, kHeads, rows, kSize),
          Dims4(kBatch, kHeads, rows, kGroups),
          Dims4(kBatch, kHeads, rows, kGroups)};
}

std::vector<DynamicPluginTensorDesc> Described(int64_t rows, DataType data) {
  const DataType kinds[] = {data,
                            data,
                            data,
                            DataType::kINT32,
                            DataType::kINT32,
                            DataType::kINT32,
                            DataType::kINT32,
                            DataType::kFLOAT,
                            DataType::kFLOAT,
                            DataType::kFLOAT,
                            data,
                            DataType::kFLOAT,
                            DataType::kFLOAT};
  std::vector<DynamicPluginTensorDesc> found;
  for (const Dims& shape : Shapes(rows)) {
    found.push_back({PluginTensorDesc{shape, kinds[found.size()], TensorFormat::kLINEAR, 1.0F}, shape, shape, shape});
  }
  return found;
}

struct Plugin {
  explicit Plugin(IPluginV3* made) : whole(made) {
    build = static_cast<IPluginV3OneBuild*>(made->getCapabilityInterface(PluginCapabilityType::kBUILD));
    run = static_cast<IPluginV3OneRuntime*>(made->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    core = static_cast<IPluginV3OneCore*>(made->getCapabilityInterface(PluginCapabilityType::kCORE));
  }
  std::unique_ptr<IPluginV3> whole;
  IPluginV3OneBuild* build;
  IPluginV3OneRuntime* run;
  IPluginV3OneCore* core;
};

IPluginV3* Create(IPluginCreatorV3One* creator, std::vector<PluginField> fields) {
  const PluginFieldCollection given{static_cast<int32_t>(fields.size()), fields.data()};
  return creator->createPlugin("node", &given, TensorRTPhase::kBUILD);
}

std::vector<PluginField> Fields(const char* policy, const char* statistic, const float* scale) {
  return {PluginField{"policy", policy, PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(policy))},
          PluginField{"statistic", statistic, PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(statistic))},
          PluginField{"scale", scale, PluginFieldType::kFLOAT32, 1}};
}

void TestDescriptions(Plugin& plugin) {
  EXPECT(std::string(plugin.core->getPluginName()) == "ReallocatedAttention");
  EXPECT(std::string(plugin.core->getPluginNamespace()) == "mosear" &&
         std::string(plugin.core->getPluginVersion()) == "1");
  EXPECT(plugin.build->getNbOutputs() == 3);
  std::vector<DynamicPluginTensorDesc> all = Described(5, DataType::kBF16);
  DataType in[10], out[3];
  for (int i = 0; i < 10; ++i) in[i] = all[i].desc.type;
  EXPECT(plugin.build->getOutputDataTypes(out, 3, in, 10) == 0);
  EXPECT(out[0] == DataType::kBF16 && out[1] == DataType::kFLOAT && out[2] == DataType::kFLOAT);
  EXPECT(plugin.build->getOutputDataTypes(out, 3, in, 9) != 0);
  Numbers numbers;
  DimsExprs shapes[10], made[3];
  for (int i = 0; i < 10; ++i) {
    shapes[i].nbDims = all[i].desc.dims.nbDims;
    for (int j = 0; j < shapes[i].nbDims; ++j)
      shapes[i].d[j] = static_cast<IExprBuilder&>(numbers).constant(all[i].desc.dims.d[j]);
  }
  EXPECT(plugin.build->getOutputShapes(shapes, 10, nullptr, 0, made, 3, numbers) == 0);
  for (int o = 0; o < 3; ++o) {
    EXPECT(made[o].nbDims == 4);
    for (int j = 0; j < 4; ++j) EXPECT(made[o].d[j]->getConstantValue() == all[10 + o].desc.dims.d[j]);
  }
  EXPECT(plugin.build->configurePlugin(all.data(), 10, all.data() + 10, 3) == 0);
  all[0].desc.dims.nbDims = 3;
  EXPECT(plugin.build->configurePlugin(all.data(), 10, all.data() + 10, 3) != 0);
}

void TestFormats(Plugin& plugin) {
  for (DataType data : {DataType::kHALF, DataType::kBF16}) {
    std::vector<DynamicPluginTensorDesc> all = Described(5, data);
    for (int i = 0; i < 13; ++i) EXPECT(plugin.build->supportsFormatCombination(i, all.data(), 10, 3));
    for (int i = 0; i < 13; ++i) {
      DynamicPluginTensorDesc kept = all[i];
      all[i].desc.format = TensorFormat::kHWC;
      EXPECT(!plugin.build->supportsFormatCombination(i, all.data(), 10, 3));
      all[i] = kept;
      all[i].desc.type = DataType::kINT8;
      EXPECT(!plugin.build->supportsFormatCombination(i, all.data(), 10, 3));
      all[i] = kept;
    }
  }
  std::vector<DynamicPluginTensorDesc> mixed = Described(5, DataType::kHALF);
  mixed[1].desc.type = DataType::kBF16;
  EXPECT(!plugin.build->supportsFormatCombination(1, mixed.data(), 10, 3));
}

// What a call launches on the stand-in; the last launch is compared.
void TestLaunches(Plugin& plugin, Words& words) {
  std::vector<char> memory(1 << 22);
  const auto at = [&](size_t offset) {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 256 + offset) / 256 * 256);
  };
  const void* inputs[10];
  void* outputs[3];
  for (int i = 0; i < 10; ++i) inputs[i] = at(4096 * static_cast<size_t>(i));
  for (int i = 0; i < 3; ++i) outputs[i] = at(65536 + 4096 * static_cast<size_t>(i));
  for (int64_t rows : {int64_t{77}, int64_t{1}}) {
    std::vector<PluginTensorDesc> in;
    const std::vector<DynamicPluginTensorDesc> all = Described(rows, DataType::kBF16);
    for (const DynamicPluginTensorDesc& each : all) in.push_back(each.desc);
    const size_t workspace = plugin.build->getWorkspaceSize(all.data(), 10, all.data() + 10, 3);
    const int before = MockLaunches();
    const int status = plugin.run->enqueue(in.data(), in.data() + 10, inputs, outputs, at(131072), nullptr);
    EXPECT(status == 0);
    if (status != 0) std::printf("%s\n", words.last.c_str());
    const MockLaunch* last = MockLastLaunch();
    if (rows > 1) {
      EXPECT(workspace == 0 && MockLaunches() == before + 1);
      EXPECT(last->grid[0] == 2 && last->grid[1] == kHeads && last->grid[2] == kBatch);  // 77 rows, tiles of 64
      EXPECT(last->values[0] == reinterpret_cast<uintptr_t>(inputs[0]));
    } else {
      EXPECT(workspace >= kBatch * kHeads * 8 * kGroups * (2 * kSize + 8) && MockLaunches() == before + 2);
      EXPECT(last->grid[0] == kHeads && last->grid[1] == kBatch && last->grid[2] == 1);
      EXPECT(last->values[0] == reinterpret_cast<uintptr_t>(at(131072)));  // the merge reads the workspace
    }
    MockFailNext("launch", CUDA_ERROR_LAUNCH_FAILED);
    EXPECT(plugin.run->enqueue(in.data(), in.data() + 10, inputs, outputs, at(131072), nullptr) != 0);
    EXPECT(words.last.find("status 719") != std::string::npos);
    in[0].dims.d[3] = 96;
    EXPECT(plugin.run->enqueue(in.data(), in.data() + 10, inputs, outputs, at(131072), nullptr) != 0);
    EXPECT(words.last.find("D=96") != std::string::npos &&
           words.last.find("add it to the catalogue") != std::string::npos);
  }
}

constexpr int64_t kWidth = 576, kOut = 576, kExperts = 2, kRank = 8;

std::vector<DynamicPluginTensorDesc> DescribedExperts(int64_t rows) {
  const DataType data = DataType::kBF16, number = DataType::kFLOAT, id = DataType::kINT32;
  const std::pair<Dims, DataType> all[] = {{Dims3(kBatch, rows, kOut), data},
                                           {Dims3(kBatch, rows, kWidth), data},
                                           {Dims2(kBatch, rows), id},
                                           {Dims3(kBatch, rows, kExperts), number},
                                           {Dims2(kRank, kWidth), data},
                                           {Dims2(kGroups * kExperts, kWidth), data},
                                           {Dims2(kGroups * kExperts * kRank, kOut), data},
                                           {Dims{1, {kGroups}}, number},
                                           {Dims{1, {2}}, id},
                                           {Dims3(kBatch, rows, kOut), data},
                                           {Dims3(kBatch, rows, kExperts), number}};
  std::vector<DynamicPluginTensorDesc> found;
  for (const auto& [shape, type] : all)
    found.push_back({PluginTensorDesc{shape, type, TensorFormat::kLINEAR, 1.0F}, shape, shape, shape});
  return found;
}

std::vector<PluginField> ExpertFields(const char* columns, const char* select, const float* scale) {
  const auto text = [](const char* name, const char* value) {
    return PluginField{name, value, PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(value))};
  };
  return {text("columns", columns), text("select", select), text("route", "token"),
          PluginField{"scale", scale, PluginFieldType::kFLOAT32, 1}};
}

void TestExpertDescriptions(IPluginCreatorV3One* creator, Words& words) {
  const float scale = 2.0F;
  Plugin plugin(Create(creator, ExpertFields("576", "soft", &scale)));
  std::vector<DynamicPluginTensorDesc> all = DescribedExperts(5);
  for (int i = 0; i < 11; ++i) EXPECT(plugin.build->supportsFormatCombination(i, all.data(), 9, 2));
  for (int i : {2, 3, 4, 8, 10}) {
    const DataType kept = all[i].desc.type;
    all[i].desc.type = DataType::kINT8;
    EXPECT(!plugin.build->supportsFormatCombination(i, all.data(), 9, 2));
    all[i].desc.type = kept;
  }
  EXPECT(plugin.build->configurePlugin(all.data(), 9, all.data() + 9, 2) == 0);
  EXPECT(plugin.build->configurePlugin(all.data(), 8, all.data() + 8, 2) != 0);
  DimsExprs shapes[9], made[2];
  Numbers numbers;
  for (int i = 0; i < 9; ++i) {
    shapes[i].nbDims = all[i].desc.dims.nbDims;
    for (int j = 0; j < shapes[i].nbDims; ++j)
      shapes[i].d[j] = static_cast<IExprBuilder&>(numbers).constant(all[i].desc.dims.d[j]);
  }
  EXPECT(plugin.build->getOutputShapes(shapes, 9, nullptr, 0, made, 2, numbers) == 0);
  EXPECT(made[0].d[2]->getConstantValue() == kOut && made[1].d[2]->getConstantValue() == kExperts);
  Plugin again(creator->createPlugin("node", plugin.run->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
  EXPECT(again.run->getFieldsToSerialize()->nbFields == 4);
  for (const char* columns : {"", "576,x", "-1", "0"}) {
    EXPECT(Create(creator, ExpertFields(columns, "soft", &scale)) == nullptr);
  }
  EXPECT(words.last.find("numbers between commas") != std::string::npos);
  EXPECT(Create(creator, ExpertFields("576", "best", &scale)) == nullptr &&
         words.last.find("select 'best'") != std::string::npos);
}

// Grids of both launches, for the Python test to compare with its launcher's.
void TestExpertLaunches(IPluginCreatorV3One* creator, Words& words) {
  const float scale = 2.0F;
  Plugin plugin(Create(creator, ExpertFields("576", "soft", &scale)));
  std::vector<PluginField> fields = ExpertFields("576", "soft", &scale);
  fields[2].data = "modality";
  fields[2].length = 8;
  Plugin by_modality(Create(creator, fields));
  std::vector<char> memory(1 << 24);
  const auto at = [&](size_t offset) {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 256 + offset) / 256 * 256);
  };
  const void* inputs[9];
  void* outputs[2] = {at(9 * 4096), at(10 * 4096)};
  for (int i = 0; i < 9; ++i) inputs[i] = at(4096 * static_cast<size_t>(i));
  for (int64_t rows : {1, 7, 171}) {
    const std::vector<DynamicPluginTensorDesc> all = DescribedExperts(rows);
    std::vector<PluginTensorDesc> in;
    for (const DynamicPluginTensorDesc& each : all) in.push_back(each.desc);
    const int before = MockLaunches();
    EXPECT(plugin.run->enqueue(in.data(), in.data() + 9, inputs, outputs, at(65536), nullptr) == 0);
    EXPECT(MockLaunches() == before + 2);
    const MockLaunch* last = MockLastLaunch();
    EXPECT(last->values[0] == reinterpret_cast<uintptr_t>(inputs[0]));  // expand's base
    std::printf("experts %lld: expand %u %u %u\n", static_cast<long long>(kBatch * rows), last->grid[0], last->grid[1],
                last->grid[2]);
    EXPECT(plugin.build->getWorkspaceSize(all.data(), 9, all.data() + 9, 2) ==
           static_cast<size_t>(4 * 16 * kBatch * rows * (kRank + kExperts)));  // 16 parts of d at most
    MockFailNext("launch", CUDA_ERROR_LAUNCH_FAILED);
    EXPECT(plugin.run->enqueue(in.data(), in.data() + 9, inputs, outputs, at(65536), nullptr) != 0);
    EXPECT(words.last.find("ModalityExpertsColumns: status 719") != std::string::npos);
    EXPECT(by_modality.run->enqueue(in.data(), in.data() + 9, inputs, outputs, at(65536), nullptr) != 0);
    EXPECT(words.last.find("GATED=0") != std::string::npos);
    in[6].dims.d[0] = 2 * kGroups * kExperts * kRank;  // another rank than any binary's
    EXPECT(plugin.run->enqueue(in.data(), in.data() + 9, inputs, outputs, at(65536), nullptr) != 0);
    EXPECT(words.last.find("no binary of modality_experts_shrink") != std::string::npos);
  }
}

// Whether the attention kernels that a plugin launches are inside; a library may be built with others.
bool Embedded() {
  for (const mosear::Kernel& kernel : mosear::Kernels()) {
    if (kernel.name() == "prefill") return true;
  }
  return false;
}

void TestSplits() {
  // Beside the Python launcher's figures: tests/plugins/test_native_plugin.py reads these lines.
  for (int64_t batch : {1, 8, 64}) {
    for (int64_t capacity : {64, 512, 4096, 32768}) {
      const mosear::trt::Sizes sizes{batch, 32, 1, 128, 32, capacity, 3};
      std::printf("splits %lld %lld %lld\n", static_cast<long long>(batch), static_cast<long long>(capacity),
                  static_cast<long long>(mosear::trt::Splits(sizes, 132)));
    }
  }
}

void TestFields(IPluginCreatorV3One* creator, Words& words) {
  const float scale = 0.125F, wrong = -1.0F;
  Plugin first(Create(creator, Fields("balance", "sum", &scale)));
  const PluginFieldCollection* kept = first.run->getFieldsToSerialize();
  Plugin second(creator->createPlugin("node", kept, TensorRTPhase::kRUNTIME));
  const PluginFieldCollection* again = second.run->getFieldsToSerialize();
  EXPECT(kept->nbFields == 3 && again->nbFields == 3);
  for (int i = 0; i < 3; ++i) {
    EXPECT(std::strcmp(kept->fields[i].name, again->fields[i].name) == 0 &&
           kept->fields[i].length == again->fields[i].length);
    const size_t bytes = i == 2 ? sizeof(float) : static_cast<size_t>(kept->fields[i].length);
    EXPECT(std::memcmp(kept->fields[i].data, again->fields[i].data, bytes) == 0);
  }
  std::unique_ptr<IPluginV3> copy(second.whole->clone());
  EXPECT(copy != nullptr && copy.get() != second.whole.get());
  EXPECT(Create(creator, Fields("balanced", "sum", &scale)) == nullptr &&
         words.last.find("policy 'balanced'") != std::string::npos);
  EXPECT(Create(creator, Fields("off", "median", &scale)) == nullptr &&
         words.last.find("statistic 'median'") != std::string::npos);
  EXPECT(Create(creator, Fields("off", "sum", &wrong)) == nullptr && words.last.find("above 0") != std::string::npos);
  EXPECT(Create(creator, {}) == nullptr);
  std::vector<PluginField> fields = Fields("off", "sum", &scale);
  fields.push_back(PluginField{"shape", &scale, PluginFieldType::kFLOAT32, 1});
  EXPECT(Create(creator, fields) == nullptr && words.last.find("field 'shape'") != std::string::npos);
  fields = Fields("off", "sum", &scale);
  fields[2].type = PluginFieldType::kINT32;
  EXPECT(Create(creator, fields) == nullptr && words.last.find("field 'scale'") != std::string::npos);
}

}  // namespace

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (library == nullptr) {
    std::printf("%s\n", dlerror());
    return EXIT_FAILURE;
  }
  const auto creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  const auto logger = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  EXPECT(creators != nullptr && logger != nullptr);
  if (failures != 0) return EXIT_FAILURE;
  Words words;
  logger(&words);
  int32_t count = 0;
  auto* creator = static_cast<IPluginCreatorV3One*>(creators(count)[0]);
  EXPECT(count == 2 && std::string(creator->getPluginName()) == "ReallocatedAttention");
  auto* experts = static_cast<IPluginCreatorV3One*>(creators(count)[1]);
  EXPECT(std::string(experts->getPluginName()) == "ModalityExpertsColumns");
  EXPECT(creator->getFieldNames()->nbFields == 3);
  TestFields(creator, words);
  const float scale = 0.125F;
  Plugin plugin(Create(creator, Fields("balance", "sum", &scale)));
  TestDescriptions(plugin);
  TestFormats(plugin);
  TestExpertDescriptions(experts, words);
  if (Embedded()) {
    TestLaunches(plugin, words);
    TestExpertLaunches(experts, words);
  } else {
    std::printf("launches not tried: no attention kernels are inside\n");
  }
  TestSplits();
  std::printf("TensorRT headers %d.%d, failures %d\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, failures);
  logger(nullptr);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
