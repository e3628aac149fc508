// Chooses the kernels for the host.
#include "kernels/dispatch.h"

#include <cstdlib>
#include <cstring>

namespace accel_tf {

#define ACCEL_TF_ISA(name, runs_here) extern const Kernels kernels_##name;
#include "kernels/isas.inc"
#undef ACCEL_TF_ISA

std::vector<const Kernels*> AvailableKernels() {
  std::vector<const Kernels*> available;
#define ACCEL_TF_ISA(name, runs_here) \
  if (runs_here) available.push_back(&kernels_##name);
#include "kernels/isas.inc"
#undef ACCEL_TF_ISA
  return available;
}

const Kernels* FindKernels(const char* name, std::string* error) {
  const std::vector<const Kernels*> available = AvailableKernels();
  if (name == nullptr || *name == '\0' || std::strcmp(name, "auto") == 0) return available.back();
  std::string names;
  for (const Kernels* kernels : available) {
    if (std::strcmp(kernels->name, name) == 0) return kernels;
    names += std::string(names.empty() ? "" : ", ") + kernels->name;
  }
  *error = std::string("no kernels called \"") + name + "\" run on this host; there are " + names +
           ", or auto";
  return nullptr;
}

const Kernels* ChosenKernels(std::string* error) {
  static std::string* const why = new std::string;
  static const Kernels* const chosen = FindKernels(std::getenv("ACCEL_TF_ISA"), why);
  if (chosen == nullptr) *error = "ACCEL_TF_ISA: " + *why;
  return chosen;
}

}  // namespace accel_tf
