// Computes attention of a case in a file with a bundle, in C++; the files are those of attention.c.
//
//     attention_cpp BUNDLE CASE OUT
#include <cstdint>
#include <fstream>
#include <iostream>
#include <vector>

#include "rpe_tvm.hpp"

template <typename T>
std::vector<T> Read(std::istream& file, std::int64_t count) {
  std::vector<T> data(count);
  file.read(reinterpret_cast<char*>(data.data()), count * sizeof(T));
  return data;
}

int main(int argc, char** argv) try {
  if (argc != 4) {
    std::cerr << "usage: " << argv[0] << " BUNDLE CASE OUT\n";
    return 2;
  }
  rpe_tvm::Attention attention(argv[1]);
  std::cout << attention.variant() << "\n";

  std::ifstream file(argv[2], std::ios::binary);
  file.exceptions(std::ios::failbit | std::ios::badbit);
  const auto n = Read<std::int64_t>(file, 8);
  rpe_tvm_arguments arguments{};
  arguments.batch = n[0], arguments.heads = n[1], arguments.n_query = n[2], arguments.n_key = n[3];
  arguments.num_features = n[4], arguments.head_dim = n[5];
  arguments.feature_map = n[6] == 1 ? RPE_TVM_PRF : RPE_TVM_NPRF;
  arguments.is_causal = n[7] != 0;
  arguments.num_offsets = n[2] + n[3] > 0 ? n[2] + n[3] - 1 : 0;
  const auto query = Read<float>(file, n[0] * n[1] * n[2] * n[5]);
  const auto key = Read<float>(file, n[0] * n[1] * n[3] * n[5]);
  const auto value = Read<float>(file, n[0] * n[1] * n[3] * n[5]);
  const auto rpe_bias = Read<float>(file, n[1] * arguments.num_offsets);
  const auto projection = Read<float>(file, n[4] * n[5]);
  std::vector<float> out(query.size());
  arguments.query = query.data(), arguments.key = key.data(), arguments.value = value.data();
  arguments.rpe_bias = rpe_bias.data(), arguments.projection = projection.data(), arguments.out = out.data();
  attention(arguments);

  std::ofstream result(argv[3], std::ios::binary);
  result.exceptions(std::ios::failbit | std::ios::badbit);
  result.write(reinterpret_cast<const char*>(out.data()), out.size() * sizeof(float));
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}
