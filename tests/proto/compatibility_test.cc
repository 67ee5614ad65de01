// The API against its baseline (proto/api_baseline.txt): what a released client may use stays. Every field,
// value, method and message of the baseline has to be there with the same number, type and label; new ones
// may come.
//
//   KVTIDE_WRITE_API_BASELINE=proto/api_baseline.txt kvtide_test_proto      adds what is new, with a release
#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/descriptor.pb.h"
#include "gtest/gtest.h"
#include "kvtide/v1/kv_cache_service.pb.h"
#include "kvtide/v1/kvtided_config.pb.h"
#include "kvtide/v1/plan.pb.h"

namespace kvtide {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::EnumDescriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::FileDescriptor;

using Api = std::set<std::string>;

void AddEnum(const EnumDescriptor& type, Api* api) {
  for (int i = 0; i < type.value_count(); i++)
    api->insert(
        absl::StrCat("value ", type.full_name(), " ", type.value(i)->name(), " = ", type.value(i)->number()));
}

void AddMessage(const Descriptor& message, Api* api) {
  api->insert(absl::StrCat("message ", message.full_name()));
  for (int i = 0; i < message.field_count(); i++) {
    const FieldDescriptor& field = *message.field(i);
    const std::string type = field.message_type() != nullptr ? field.message_type()->full_name()
                             : field.enum_type() != nullptr  ? field.enum_type()->full_name()
                                                             : field.type_name();
    api->insert(absl::StrCat("field ", message.full_name(), " ", field.number(), " ",
                             field.is_repeated()                   ? "repeated "
                             : field.has_optional_keyword()        ? "optional "
                             : field.containing_oneof() != nullptr ? "oneof "
                                                                   : "",
                             type, " ", field.name()));
  }
  for (int i = 0; i < message.nested_type_count(); i++) AddMessage(*message.nested_type(i), api);
  for (int i = 0; i < message.enum_type_count(); i++) AddEnum(*message.enum_type(i), api);
}

void AddFile(const FileDescriptor& file, Api* api) {
  for (int i = 0; i < file.message_type_count(); i++) AddMessage(*file.message_type(i), api);
  for (int i = 0; i < file.enum_type_count(); i++) AddEnum(*file.enum_type(i), api);
  for (int i = 0; i < file.service_count(); i++) {
    for (int m = 0; m < file.service(i)->method_count(); m++) {
      const auto& method = *file.service(i)->method(m);
      api->insert(absl::StrCat("method ", method.full_name(), method.client_streaming() ? " stream " : " ",
                               method.input_type()->full_name(), " ->",
                               method.server_streaming() ? " stream " : " ",
                               method.output_type()->full_name()));
    }
  }
}

// Of all files that the service, the plans, the blocks and the configuration need.
Api TheApi() {
  Api api;
  std::set<const FileDescriptor*> seen;
  const std::function<void(const FileDescriptor*)> visit = [&](const FileDescriptor* file) {
    if (file->package() != "kvtide.v1" || !seen.insert(file).second) return;
    AddFile(*file, &api);
    for (int i = 0; i < file->dependency_count(); i++) visit(file->dependency(i));
  };
  for (const Descriptor* message :
       {v1::SessionRequest::descriptor(), v1::PlanRequest::descriptor(), v1::KvtidedConfig::descriptor()})
    visit(message->file());
  return api;
}

std::vector<std::string> Missing(const Api& baseline, const Api& now) {
  std::vector<std::string> missing;
  std::set_difference(baseline.begin(), baseline.end(), now.begin(), now.end(), std::back_inserter(missing));
  return missing;
}

TEST(Compatibility, WhatReleasedClientsUseIsThere) {
  const Api now = TheApi();
  if (const char* path = std::getenv("KVTIDE_WRITE_API_BASELINE"); path != nullptr) {
    std::ofstream out(path);
    for (const std::string& line : now) out << line << "\n";
  }
  Api baseline;
  std::ifstream file(KVTIDE_API_BASELINE);
  for (std::string line; std::getline(file, line);) baseline.insert(line);
  ASSERT_GT(baseline.size(), 200u) << "no baseline at " << KVTIDE_API_BASELINE;
  EXPECT_THAT(Missing(baseline, now), testing::IsEmpty())
      << "a field that is not needed any more stays, marked deprecated; a new meaning gets a new number";
}

// The check finds what breaks a client, and nothing else.
TEST(Compatibility, FindsWhatIsPlanted) {
  google::protobuf::FileDescriptorProto proto;
  proto.set_name("planted.proto");
  proto.set_package("kvtide.v1");
  auto* message = proto.add_message_type();
  message->set_name("Planted");
  auto* field = message->add_field();
  field->set_name("size");
  field->set_number(1);
  field->set_type(google::protobuf::FieldDescriptorProto::TYPE_INT64);
  field->set_label(google::protobuf::FieldDescriptorProto::LABEL_OPTIONAL);
  const auto api_of = [](const google::protobuf::FileDescriptorProto& file) {
    google::protobuf::DescriptorPool pool;
    Api api;
    AddFile(*pool.BuildFile(file), &api);
    return api;
  };
  const Api before = api_of(proto);
  const auto broken = [&](const std::function<void(google::protobuf::FieldDescriptorProto*)>& change) {
    google::protobuf::FileDescriptorProto changed = proto;
    change(changed.mutable_message_type(0)->mutable_field(0));
    return Missing(before, api_of(changed)).size();
  };
  EXPECT_EQ(broken([](auto*) {}), 0u);
  EXPECT_EQ(broken([](auto* f) { f->set_number(2); }), 1u);
  EXPECT_EQ(broken([](auto* f) { f->set_name("bytes"); }), 1u) << "JSON names it";
  EXPECT_EQ(broken([](auto* f) { f->set_type(google::protobuf::FieldDescriptorProto::TYPE_STRING); }), 1u);
  EXPECT_EQ(broken([](auto* f) { f->set_label(google::protobuf::FieldDescriptorProto::LABEL_REPEATED); }),
            1u);
  google::protobuf::FileDescriptorProto more = proto;
  more.add_message_type()->set_name("Another");
  EXPECT_TRUE(Missing(before, api_of(more)).empty());
}

}  // namespace
}  // namespace kvtide
