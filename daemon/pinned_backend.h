// The host tier beside a GPU: another backend whose slabs are registered with the driver, so that copies
// between the tiers run at full speed. What cannot be registered (locked memory is limited) works all the
// same, slower, and is logged.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace kvtide {

std::unique_ptr<Backend> MakePinnedBackend(std::unique_ptr<Backend> inner);

}  // namespace kvtide
