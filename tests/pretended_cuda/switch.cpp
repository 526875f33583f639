// Lets PyTorch speak of one CUDA device where there is none; it brings no kernel.
//
// Autograd asks two objects about a device: its guard, which knows the present stream, and CUDA's
// hooks, which know whether there is CUDA at all. Here are both, for a device that nothing runs on.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

#include <cstring>
#include <utility>

namespace {

struct PretendedHooks : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};

PretendedHooks hooks;
c10::impl::FakeGuardImpl<c10::DeviceType::CUDA> pretended_guard;
const c10::impl::DeviceGuardImplInterface* guard = &pretended_guard;

}  // namespace

// Puts these objects in the place of PyTorch's own, or takes them away again. PyTorch makes its hooks
// once and keeps them; they have no members, so that nothing but the table of their functions, which
// they start with, is exchanged.
extern "C" void exchange_cuda() {
  auto* theirs = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  char table[sizeof(void*)];
  std::memcpy(table, static_cast<void*>(theirs), sizeof table);
  std::memcpy(static_cast<void*>(theirs), static_cast<void*>(&hooks), sizeof table);
  std::memcpy(static_cast<void*>(&hooks), table, sizeof table);
  constexpr auto cuda = static_cast<std::size_t>(c10::DeviceType::CUDA);
  guard = c10::impl::device_guard_impl_registry[cuda].exchange(guard);
}
