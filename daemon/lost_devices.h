// Devices of the first tier on which this process can do nothing more until it starts anew: after some errors
// of CUDA every call on the device fails.
#pragma once

#include <string>

#include "daemon/backends.h"

namespace kvtide {

struct LostDevices {
  std::string text;  // which, and by what; empty = none
  bool all = false;
};
// Quick; from any thread.
LostDevices FindLostDevices(const Backends& backends);

}  // namespace kvtide
