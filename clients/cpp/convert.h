// Between the client's plain structs and the messages of kvtide.v1. Pure functions.
#pragma once

#include <span>

#include "absl/status/status.h"
#include "clients/cpp/client.h"
#include "grpcpp/support/status.h"
#include "kvtide/v1/plan.pb.h"
#include "kvtide/v1/sequence.pb.h"
#include "kvtide/v1/server.pb.h"

namespace kvtide::client {

absl::Status FromGrpc(const grpc::Status& status);

void ToProto(const TensorRef& tensor, v1::Tensor* proto);
void ToProto(const ModelRope& rope, v1::Rope* proto);
void ToProto(const Model& model, v1::Model* proto);
void ToProto(const SequenceOptions& options, v1::CreateSequenceRequest* proto);
void ToProto(const AttentionOptions& options, v1::AttentionOptions* proto);
void ToProto(const PlanQuestion& question, v1::PlanRequest* proto);

Model FromProto(const v1::Model& proto);
ServerInfo FromProto(const v1::GetServerInfoResponse& proto);
SequenceInfo FromProto(const v1::Sequence& proto);
ServerStats FromProto(const v1::GetStatsResponse& proto);
PlanAnswer FromProto(const v1::PlanResponse& proto);

// Copies a result into the caller's memory; InvalidArgument if that has another size.
absl::Status CopyResult(const v1::AttendResult& result, std::span<float> output, std::span<float> lse);

// Adds the rows of one answer to those of the answers before. Internal if the daemon's answer makes no sense.
absl::Status AppendRows(const v1::ReadTokensResponse& proto, std::vector<LayerRows>* rows);

}  // namespace kvtide::client
