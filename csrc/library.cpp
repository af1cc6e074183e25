// The Python module of an extension: importing it runs the static registrations of csrc/cpu or csrc/cuda.
#include <Python.h>

#define IVFAST_PASTE(a, b) a##b
#define IVFAST_INIT(name) IVFAST_PASTE(PyInit_, name)
#define IVFAST_TEXT_OF(name) #name
#define IVFAST_TEXT(name) IVFAST_TEXT_OF(name)

extern "C" __attribute__((visibility("default"))) PyObject* IVFAST_INIT(TORCH_EXTENSION_NAME)() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, IVFAST_TEXT(TORCH_EXTENSION_NAME), nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
