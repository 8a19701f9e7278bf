// One way to write a file: it has its old content or its new one, whoever else writes and whenever the power goes.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "quantrain/ops/export.h"

namespace quantrain::nn::detail {

// Puts the pieces, one after the other, in place of the file at `path`: written under a name of its own in the same
// folder (created exclusively), synchronized, renamed, and the folder synchronized. Of several writers the last to
// rename wins, whole. Temporaries that a killed process left for the same path are removed; those of a running one are
// locked and stay. Raises c10::Error where the folder or the file cannot be written; the file is then as it was.
QUANTRAIN_API void replace_file(const std::string& path, const std::vector<std::string_view>& pieces);

}  // namespace quantrain::nn::detail
