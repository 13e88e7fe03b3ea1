// Stand-ins for what the CUDA host functions ask of torch's CUDA part, so that they run on CPU tensors over
// the PTX simulator (_cuda_host.py renames the calls). Data pointers become the simulator's tagged addresses.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>

extern "C" {

uint64_t ptxsim_register(uint64_t address, uint64_t bytes, int flags, const char* name);

__attribute__((visibility("default"))) int stand_in_copies = 0;

int32_t stand_in_device_type_cuda() { return aoti_torch_device_type_cpu(); }

AOTITorchError stand_in_get_current_cuda_stream(int32_t, void** stream) {
    *stream = nullptr;
    return 0;
}

AOTITorchError stand_in_create_device_guard(int32_t, DeviceGuardHandle* guard) {
    *guard = nullptr;
    return 0;
}

AOTITorchError stand_in_delete_device_guard(DeviceGuardHandle) { return 0; }

AOTITorchError stand_in_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char** message) {
    *message = nullptr;
    return 0;
}

void stand_in_cuda_free_error_msg(char*) {}

AOTITorchError stand_in_copy_(AtenTensorHandle to, AtenTensorHandle from, int32_t non_blocking) {
    ++stand_in_copies;
    return aoti_torch_copy_(to, from, non_blocking);
}

AOTITorchError stand_in_get_data_ptr(AtenTensorHandle tensor, void** data) {
    int64_t bytes = 0, offset = 0;
    int32_t dtype = 0;
    const bool failed =
        aoti_torch_get_data_ptr(tensor, data) || aoti_torch_get_storage_size(tensor, &bytes) ||
        aoti_torch_get_storage_offset(tensor, &offset) || aoti_torch_get_dtype(tensor, &dtype);
    if (failed || *data == nullptr || bytes == 0) {
        return failed;
    }
    const uint64_t before = offset * aoti_torch_dtype_element_size(dtype);
    const int writable = 1;
    const auto address = reinterpret_cast<uint64_t>(*data) - before;
    *data = reinterpret_cast<void*>(ptxsim_register(address, bytes, writable, "a tensor") + before);
    return 0;
}

}  // extern "C"
