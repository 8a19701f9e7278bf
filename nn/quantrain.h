// All of quantrain's C++ interface.
#pragma once

#include "quantrain/nn/checkpoint.h"
#include "quantrain/nn/layers.h"
#include "quantrain/nn/recipe.h"
#include "quantrain/ops/fake_quant.h"
