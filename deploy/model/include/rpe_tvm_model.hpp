// Runs a model that rpe_tvm.edge.export_model wrote: one library, and a list of calls on fixed buffers.
#ifndef RPE_TVM_MODEL_HPP_
#define RPE_TVM_MODEL_HPP_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace rpe_tvm {

class ModelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A contiguous tensor of the model. It belongs to the model and stays where it is.
struct Tensor {
  std::string dtype;  // float32, int32, int64 or bool
  std::vector<std::int64_t> shape;
  void* data = nullptr;

  std::size_t bytes() const;
};

// One thread may use a model at a time.
class Model {
 public:
  // Opens the model in a directory; throws ModelError with the reason where it is refused.
  explicit Model(const std::string& directory);
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  // Write to the data of the inputs, run, and read the data of the outputs.
  const std::vector<const Tensor*>& inputs() const;
  const std::vector<const Tensor*>& outputs() const;
  void run();

  // What it was compiled for, such as aarch64-cortex-a72.
  const std::string& variant() const;

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

}  // namespace rpe_tvm

#endif
