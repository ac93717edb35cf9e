// Reads model.txt, a manifest (see manifest.h) of the kind rpe_tvm-model, with these lines besides:
//
//     library BYTES SHA256 FILE
//     weights BYTES SHA256 FILE
//     arena BYTES                                   memory of inputs and intermediate results
//     tensor NUMBER PLACE OFFSET DTYPE NDIM SIZE... in order of their numbers; PLACE is weight or scratch
//     input NUMBER
//     call FUNCTION ARGUMENT...                     t3 is tensor 3, i256 the number 256
//     output NUMBER
#include "rpe_tvm_model.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <sstream>

extern "C" {
#include "library.h"
#include "manifest.h"
const char* rpe_tvm_last_error(void);
}

namespace rpe_tvm {
namespace {

constexpr std::size_t kAlignment = 64;  // what compiled functions are promised

const std::map<std::string, DLDataType> kTypes = {{"float32", {2, 32, 1}},
                                                  {"int32", {0, 32, 1}},
                                                  {"int64", {0, 64, 1}},
                                                  {"bool", {6, 8, 1}}};

struct Freed {
  void operator()(void* data) const { std::free(data); }
};
using Memory = std::unique_ptr<unsigned char, Freed>;

[[noreturn]] void Fail() { throw ModelError(rpe_tvm_last_error()); }

Memory Aligned(std::size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, kAlignment, bytes != 0 ? bytes : 1) != 0) {
    throw ModelError("Out of memory: the model needs " + std::to_string(bytes) + " bytes.");
  }
  return Memory(static_cast<unsigned char*>(data));
}

struct Call {
  rpe_tvm_kernel kernel;
  std::vector<TVMFFIAny> arguments;
};

}  // namespace

std::size_t Tensor::bytes() const {
  std::size_t total = kTypes.at(dtype).bits / 8;
  for (const std::int64_t size : shape) total *= static_cast<std::size_t>(size);
  return total;
}

struct Model::Parts {
  std::string variant;
  void* library = nullptr;
  Memory weights, arena;
  std::size_t weights_bytes = 0, arena_bytes = 0;
  std::deque<Tensor> tensors;  // pointers to elements stay valid
  std::deque<DLTensor> described;
  std::vector<const Tensor*> inputs, outputs;
  std::vector<Call> calls;

  ~Parts() {
    if (library != nullptr) dlclose(library);
  }

  void Read(const std::string& directory, std::istringstream& line);
  void AddTensor(std::istringstream& line);
  void AddCall(std::istringstream& line);
};

void Model::Parts::Read(const std::string& directory, std::istringstream& line) {
  std::string kind, sha256, file;
  long long bytes = 0;
  std::size_t number = 0;
  line >> kind;
  if (kind == "library" && line >> bytes >> sha256 >> file) {
    if (!Memory(rpe_tvm_read_checked(directory.c_str(), file.c_str(), bytes, sha256.c_str()))) Fail();
    library = rpe_tvm_open_library(directory.c_str(), file.c_str());
    if (library == nullptr) Fail();
  } else if (kind == "weights" && line >> bytes >> sha256 >> file) {
    const Memory read(rpe_tvm_read_checked(directory.c_str(), file.c_str(), bytes, sha256.c_str()));
    if (!read) Fail();
    weights_bytes = static_cast<std::size_t>(bytes);
    weights = Aligned(weights_bytes);
    std::memcpy(weights.get(), read.get(), weights_bytes);
  } else if (kind == "arena" && line >> arena_bytes) {
    arena = Aligned(arena_bytes);
  } else if (kind == "tensor") {
    AddTensor(line);
  } else if (kind == "call") {
    AddCall(line);
  } else if (kind == "input" && line >> number) {
    inputs.push_back(&tensors.at(number));
  } else if (kind == "output" && line >> number) {
    outputs.push_back(&tensors.at(number));
  }
}

void Model::Parts::AddTensor(std::istringstream& line) {
  std::string place;
  std::size_t number = 0, offset = 0, ndim = 0;
  Tensor tensor;
  line >> number >> place >> offset >> tensor.dtype >> ndim;
  tensor.shape.resize(ndim);
  for (std::int64_t& size : tensor.shape) line >> size;
  if (!line || kTypes.count(tensor.dtype) == 0) throw ModelError("model.txt has a tensor that this host cannot read.");
  const bool is_weight = place == "weight";
  if (offset + tensor.bytes() > (is_weight ? weights_bytes : arena_bytes)) {
    throw ModelError("model.txt has a tensor outside of its memory.");
  }
  tensor.data = (is_weight ? weights : arena).get() + offset;
  tensors.push_back(tensor);
  Tensor& kept = tensors.back();
  described.push_back({kept.data, {kDLCPU, 0}, static_cast<int>(ndim), kTypes.at(kept.dtype), kept.shape.data(),
                       nullptr, 0});  // without strides: contiguous
}

void Model::Parts::AddCall(std::istringstream& line) {
  std::string function, word;
  Call call{};
  line >> function;
  if (library == nullptr || rpe_tvm_find_kernel(library, function.c_str(), &call.kernel) != 0) Fail();
  while (line >> word) {
    TVMFFIAny argument{};
    const long long number = std::stoll(word.substr(1));
    if (word[0] == 't') {
      argument.type_index = kTVMFFIDLTensorPtr;
      argument.value.v_ptr = &described.at(static_cast<std::size_t>(number));
    } else {
      argument.type_index = kTVMFFIInt;
      argument.value.v_int64 = number;
    }
    call.arguments.push_back(argument);
  }
  calls.push_back(call);
}

Model::Model(const std::string& directory) : parts_(new Parts) {
  const Memory text(reinterpret_cast<unsigned char*>(
      rpe_tvm_read_manifest(directory.c_str(), "model.txt", "rpe_tvm-model")));
  if (!text) Fail();
  char variant[64] = "";
  if (rpe_tvm_choose_variant(reinterpret_cast<const char*>(text.get()), variant) != 0) Fail();
  parts_->variant = variant;
  std::istringstream lines(reinterpret_cast<const char*>(text.get()));
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    try {
      parts_->Read(directory, words);
    } catch (const std::logic_error&) {  // a number that is none, or names no tensor
      throw ModelError("model.txt has a line that this host cannot read: " + line);
    }
  }
}

Model::~Model() = default;

const std::vector<const Tensor*>& Model::inputs() const { return parts_->inputs; }
const std::vector<const Tensor*>& Model::outputs() const { return parts_->outputs; }
const std::string& Model::variant() const { return parts_->variant; }

void Model::run() {
  for (const Call& call : parts_->calls) {
    if (rpe_tvm_call(call.kernel, call.arguments.data(), static_cast<int>(call.arguments.size())) != 0) Fail();
  }
}

}  // namespace rpe_tvm
