// What most files of the library include. Each still includes what it uses: it compiles without this too.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/pimpl.h>
