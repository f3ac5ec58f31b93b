// libmosear_trt_plugin.so: our mechanisms for TensorRT 10 and 11, over the kernels of libmosear_kernels. TensorRT loads
// it by IPluginRegistry::loadLibrary, or `trtexec --dynamicPlugins`.
#include "node.h"

#define MOSEAR_EXPORT extern "C" __attribute__((visibility("default")))

MOSEAR_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { mosear::trt::SetLoggerFinder(finder); }

MOSEAR_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static nvinfer1::IPluginCreatorInterface* list[] = {&mosear::trt::AttentionCreator(), &mosear::trt::ExpertsCreator()};
  count = 2;
  return list;
}
