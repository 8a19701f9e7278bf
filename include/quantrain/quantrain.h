// All of quantrain's C++ interface.
#pragma once

#include "quantrain/amp/autocast.h"
#include "quantrain/amp/fused_adamw.h"
#include "quantrain/amp/grad_scaler.h"
#include "quantrain/amp/master_weights.h"
#include "quantrain/nn/checkpoint.h"
#include "quantrain/nn/gradient_probe.h"
#include "quantrain/nn/int8_linear.h"
#include "quantrain/nn/layers.h"
#include "quantrain/nn/recipe.h"
#include "quantrain/ops/fake_quant.h"
#include "quantrain/ops/gradient_quant.h"
#include "quantrain/ops/gradient_quant_layers.h"
#include "quantrain/ops/int8.h"
#include "quantrain/ops/int8_fused.h"
#include "quantrain/ops/int8_linear.h"
