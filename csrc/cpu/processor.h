// Whose processor this is.
#pragma once

namespace fusewire {

bool cpu_is_intel();

}  // namespace fusewire
