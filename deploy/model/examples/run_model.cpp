// Runs a model on inputs in a file.
//
//     run_model MODEL INPUTS OUTPUTS
//
// INPUTS holds the bytes of all inputs, one after the other; OUTPUTS gets those of all outputs.
#include <fstream>
#include <iostream>

#include "rpe_tvm_model.hpp"

int main(int argc, char** argv) try {
  if (argc != 4) {
    std::cerr << "usage: " << argv[0] << " MODEL INPUTS OUTPUTS\n";
    return 2;
  }
  rpe_tvm::Model model(argv[1]);
  std::cout << model.variant() << "\n";
  std::ifstream inputs(argv[2], std::ios::binary);
  for (const rpe_tvm::Tensor* input : model.inputs()) {
    if (!inputs.read(static_cast<char*>(input->data), input->bytes())) {
      throw rpe_tvm::ModelError(std::string("Cannot read the inputs from ") + argv[2] + ".");
    }
  }
  model.run();
  std::ofstream outputs(argv[3], std::ios::binary);
  for (const rpe_tvm::Tensor* output : model.outputs()) {
    outputs.write(static_cast<const char*>(output->data), output->bytes());
  }
  if (!outputs.flush()) throw rpe_tvm::ModelError(std::string("Cannot write to ") + argv[3] + ".");
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}
