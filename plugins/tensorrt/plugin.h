// The op as a plugin for TensorRT and TensorRT-RTX: IPluginV3 with IPluginV3OneBuildV2.
#pragma once

#include <NvInferRuntime.h>

#include "op_spec.h"

namespace fwl::trt {

// Sets where messages go. TensorRT passes the finder when it loads the library; it may be null.
void set_logger_finder(nvinfer1::ILoggerFinder* finder);

// Name of an optional INT32 field, and attribute of the ONNX node. If it is 1, present_state is
// written over past_state (getAliasedInput).
constexpr char kInPlaceField[] = "in_place_state";

// The versions of the plugin, which are those of the op: the current one, and the older one, which
// takes float32 only.
constexpr const char* kVersions[] = {op::kPluginVersion, op::kFloat32PluginVersion};

// The op in one network or engine.
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuildV2,
                     public nvinfer1::IPluginV3OneRuntime {
public:
  // `version` is one of kVersions.
  Plugin(const char* version, bool in_place_state);

  nvinfer1::IPluginCapability*
  getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  Plugin* clone() noexcept override;

  const char* getPluginName() const noexcept override;
  const char* getPluginVersion() const noexcept override;
  const char* getPluginNamespace() const noexcept override;

  int32_t getNbOutputs() const noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count,
                             const nvinfer1::DataType* inputs,
                             int32_t input_count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                          const nvinfer1::DimsExprs* shape_inputs, int32_t shape_input_count,
                          nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t output_count) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t output_count) const noexcept override;
  int32_t getAliasedInput(int32_t output) noexcept override;

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                        const nvinfer1::PluginTensorDesc* outputs,
                        int32_t output_count) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs,
                  const nvinfer1::PluginTensorDesc* output_descs, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
  Plugin* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

private:
  void check_types(const nvinfer1::DataType* inputs) const;

  const char* version_;
  int32_t in_place_state_;
  nvinfer1::PluginField field_;
  nvinfer1::PluginFieldCollection fields_;
};

// Creates plugins of one version from the fields of a node.
class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
  explicit Creator(const char* version);

  Plugin* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                       nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override;
  const char* getPluginName() const noexcept override;
  const char* getPluginVersion() const noexcept override;
  const char* getPluginNamespace() const noexcept override;

private:
  const char* version_;
  nvinfer1::PluginField field_;
  nvinfer1::PluginFieldCollection fields_;
};

} // namespace fwl::trt
