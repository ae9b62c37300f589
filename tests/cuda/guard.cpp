// Make a CPU build of torch accept tensors that say they are on "cuda" (tests/cuda/device.py).
//
// Autograd asks the device guard and the CUDA hooks for devices and streams, and aborts the process where there
// are none. Both are answered here; nothing computes. Load this library before torch.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>

namespace {

using namespace c10;

DeviceIndex devices() {
  const char* given = std::getenv("SIMULATED_GPUS");
  return static_cast<DeviceIndex>(given ? std::atoi(given) : 8);
}

struct Guard final : public impl::DeviceGuardImplInterface {
  static thread_local DeviceIndex current;

  static DeviceIndex exchange(DeviceIndex index) {
    auto before = current;
    if (index >= 0) current = index;
    return before;
  }

  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device device) const override { return Device(type(), exchange(device.index())); }
  Device getDevice() const override { return Device(type(), current); }
  void setDevice(Device device) const override { exchange(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override { exchange(device.index()); }
  Stream getStream(Device device) const noexcept override {
    return Stream(Stream::DEFAULT, Device(type(), device.index() < 0 ? current : device.index()));
  }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const noexcept override { return getStream(stream.device()); }
  DeviceIndex deviceCount() const noexcept override { return devices(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};

thread_local DeviceIndex Guard::current = 0;
impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, new Guard());

}  // namespace

namespace at {

struct CUDAHooks final : public CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  void init() const override {}
  DeviceIndex deviceCount() const override { return devices(); }
  int getNumGPUs() const override { return devices(); }
  DeviceIndex getCurrentDevice() const override { return Guard::current; }
  DeviceIndex current_device() const override { return Guard::current; }
  void setCurrentDevice(DeviceIndex index) const override { Guard::exchange(index); }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return Guard::exchange(index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return Guard::exchange(index); }
  bool isPinnedPtr(const void*) const override { return false; }
  Device getDeviceFromPtr(void*) const override { return Device(DeviceType::CUDA, Guard::current); }
  void deviceSynchronize(DeviceIndex) const override {}
  long versionRuntimeCuDNN() const override { return 91600; }
};

REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at
