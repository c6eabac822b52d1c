// Coefficients of 2^x = 2^floor(x) * p(x - floor(x)).
#pragma once

namespace fusewire::FUSEWIRE_ISA {

// p is the minimax polynomial of 2^f on [0, 1) for the relative error, with p(0) = 1 exactly, so that the largest logit of a row of attention
// weighs exactly 1. Degree 6: 2e-9. Degree 3: 9e-5, a twentieth of what rounding to bf16 loses.
template <int degree>
struct Exp2;
template <>
struct Exp2<6> { static constexpr float c[6] = {0.693147044f, 0.240229306f, 0.0554852805f, 0.00967545172f, 0.0012467845f, 0.0002161292f}; };
template <>
struct Exp2<3> { static constexpr float c[3] = {0.695116784f, 0.227644998f, 0.0770670375f}; };

}  // namespace fusewire::FUSEWIRE_ISA
