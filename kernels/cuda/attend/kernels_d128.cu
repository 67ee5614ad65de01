#include "kernels/cuda/attend/instantiate.cuh"

namespace kvtide::cuda {

void AddKernels128(std::vector<AttendKernel>* list) {
  AddCommonPairs<128>(list);
  AddHalf<true, 128>(list);
  AddCoded<Q5_0, Q5_0, 128>(list);
  AddCoded<Q4_0, Q4_0, 128>(list);
  AddCoded<Q8_0, Q4_0, 128>(list);
  AddCoded<Q8_0, Turbo2, 128>(list);
  AddCoded<Turbo4, Turbo2, 128>(list);
  AddCoded<Turbo3, Turbo4, 128>(list);
  AddCoded<Turbo3, Turbo2, 128>(list);
  AddCoded<Q8_0, Wht4, 128>(list);
  AddCoded<Turbo4, Wht4, 128>(list);
}

}  // namespace kvtide::cuda
