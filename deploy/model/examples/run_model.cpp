// Runs a model on inputs in a file, or checks it on this machine.
//
//     run_model MODEL INPUTS OUTPUTS
//     run_model MODEL
//
// INPUTS holds the bytes of all inputs, one after the other; OUTPUTS gets those of all outputs. Without files, the inputs
// and the expected outputs come from example.bin of the model.
#include <chrono>
#include <cmath>
#include <fstream>
#include <iostream>
#include <vector>

#include "rpe_tvm_model.hpp"

namespace {

constexpr double kTolerance = 1e-4;  // of float32 after some layers, times the largest value

void Read(std::istream& file, void* data, std::size_t bytes) {
  if (!file.read(static_cast<char*>(data), static_cast<std::streamsize>(bytes))) {
    throw rpe_tvm::ModelError("Cannot read the inputs: the file is missing or too short.");
  }
}

// Runs on example.bin and returns whether the outputs are the expected ones.
bool Check(rpe_tvm::Model& model, const std::string& directory) {
  std::ifstream file(directory + "/example.bin", std::ios::binary);
  for (const rpe_tvm::Tensor* input : model.inputs()) Read(file, input->data, input->bytes());
  model.run();  // the first run makes memory
  const auto start = std::chrono::steady_clock::now();
  model.run();
  const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;
  bool is_good = true;
  for (const rpe_tvm::Tensor* output : model.outputs()) {
    if (output->dtype != "float32") throw rpe_tvm::ModelError("Expected outputs of float32, got " + output->dtype + ".");
    std::vector<float> expected(output->bytes() / sizeof(float));
    Read(file, expected.data(), output->bytes());
    double error = 0, largest = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const double off = std::fabs(static_cast<const float*>(output->data)[i] - expected[i]);
      if (!(off <= error)) error = off;  // a NaN is larger, too
      largest = std::fmax(largest, std::fabs(expected[i]));
    }
    const bool fits = error <= kTolerance * largest;
    is_good = is_good && fits;
    std::cout << "largest difference " << error << " of " << largest << (fits ? ", ok" : ", WRONG") << "\n";
  }
  std::cout << elapsed.count() << " ms\n";
  return is_good;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2 && argc != 4) {
    std::cerr << "usage: " << argv[0] << " MODEL [INPUTS OUTPUTS]\n";
    return 2;
  }
  rpe_tvm::Model model(argv[1]);
  std::cout << model.variant() << "\n";
  if (argc == 2) return Check(model, argv[1]) ? 0 : 1;
  std::ifstream inputs(argv[2], std::ios::binary);
  for (const rpe_tvm::Tensor* input : model.inputs()) Read(inputs, input->data, input->bytes());
  model.run();
  std::ofstream outputs(argv[3], std::ios::binary);
  for (const rpe_tvm::Tensor* output : model.outputs()) {
    outputs.write(static_cast<const char*>(output->data), static_cast<std::streamsize>(output->bytes()));
  }
  if (!outputs.flush()) throw rpe_tvm::ModelError(std::string("Cannot write to ") + argv[3] + ".");
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}
