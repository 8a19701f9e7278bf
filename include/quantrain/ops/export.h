// Symbols of the shared library that programs link to; everything else stays hidden.
#pragma once

#if defined(_WIN32)
#define QUANTRAIN_API __declspec(dllexport)
#else
#define QUANTRAIN_API __attribute__((visibility("default")))
#endif
