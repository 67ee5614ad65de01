// What happens when ordinary memory runs out: the process says so and ends. Containers that were half changed
// are no state to go on from; whoever runs the process starts it again.
#pragma once

namespace kvtide {

// From now on a failing `new` writes a line to standard error and aborts, instead of throwing.
void EndProcessWhenOutOfMemory();

}  // namespace kvtide
