// The C interface of rpe_tvm.h for C++: an operator that closes itself, and exceptions.
#ifndef RPE_TVM_HPP_
#define RPE_TVM_HPP_

#include <memory>
#include <stdexcept>
#include <string>

#include "rpe_tvm.h"

namespace rpe_tvm {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Attention {
 public:
  // Opens the bundle in a directory; throws Error with the reasons where it is refused.
  explicit Attention(const std::string& bundle) : self_(rpe_tvm_open(bundle.c_str()), rpe_tvm_close) {
    if (self_ == nullptr) throw Error(rpe_tvm_last_error());
  }

  // Computes attention; throws Error where an argument does not fit.
  void operator()(const rpe_tvm_arguments& arguments) {
    if (rpe_tvm_attention(self_.get(), &arguments) != 0) throw Error(rpe_tvm_last_error());
  }

  std::string variant() const { return rpe_tvm_variant(self_.get()); }
  std::int64_t num_features() const { return rpe_tvm_num_features(self_.get()); }
  std::int64_t head_dim() const { return rpe_tvm_head_dim(self_.get()); }
  std::int64_t max_length() const { return rpe_tvm_max_length(self_.get()); }

 private:
  std::unique_ptr<rpe_tvm_operator, decltype(&rpe_tvm_close)> self_;
};

}  // namespace rpe_tvm

#endif
