// How the installed PyTorch's layer norm sums, by dtype; found out by comparison (kernels/adaln/native.py) before the first exact call.
#pragma once
#include <atomic>

#include "common/stock_order.h"
#include "common/tensor.h"

namespace fusewire {

inline std::atomic<StockOrder>& order_of(ScalarType type) {
  static std::atomic<StockOrder> orders[4] = {StockOrder::unknown, StockOrder::unknown, StockOrder::unknown, StockOrder::unknown};
  return orders[type == ScalarType::Float ? 0 : type == ScalarType::Double ? 1 : type == ScalarType::BFloat16 ? 2 : 3];
}

// The order for an exact call.
inline StockOrder known_order(ScalarType type) {
  const StockOrder order = order_of(type);
  STD_TORCH_CHECK(order != StockOrder::unknown, "fusewire: exact LayerNorm was called before PyTorch's order of summation was known");
  return order;
}

}  // namespace fusewire
