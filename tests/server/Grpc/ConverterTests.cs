using Google.Protobuf;
using Google.Protobuf.Reflection;
using Grpc.Core;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.Server.Generation;
using Rollout.Server.Grpc;
using Rollout.V1;

namespace Rollout.Server.Tests;

/// <summary>Every field of the protos, alone, changes exactly its field of the engine's request.</summary>
public sealed class ConverterTests
{
    private const uint TooMuch = int.MaxValue + 1u;

    private static readonly ByteTokenizer s_bytes = new();

    /// <summary>Every field of a group's request, with a value of its own, and the resulting change of the engine's request.</summary>
    private static readonly Dictionary<string, (Action<GenerateRequest> Set, Func<GroupRequest, GroupRequest> Expected)> s_generate = new()
    {
        ["request_id"] = (r => r.RequestId = "mine", g => g with { Id = "mine" }),
        ["prompt_ids.ids"] = (r => r.PromptIds = new TokenIds { Ids = { 0, int.MaxValue, 7 } },
            g => g with { Prompt = [0, int.MaxValue, 7] }),
        ["prompt_text"] = (r => r.PromptText = "aé", g => g with { Prompt = [0x61, 0xC3, 0xA9] }),
        ["n"] = (r => r.N = 0, g => g with { N = 0 }),
        ["seed"] = (r => r.Seed = ulong.MaxValue, g => g with { Seed = ulong.MaxValue }),
        ["sampling.temperature"] = (r => r.Sampling.Temperature = 0, g => g with { Temperature = 0 }),
        ["sampling.top_k"] = (r => r.Sampling.TopK = 3, g => g with { TopK = 3 }),
        ["sampling.top_p"] = (r => r.Sampling.TopP = 0, g => g with { TopP = 0 }),
        ["sampling.min_p"] = (r => r.Sampling.MinP = 0.25f, g => g with { MinP = 0.25f }),
        ["sampling.logit_bias"] = (
            r => r.Sampling.LogitBias.Add(new Dictionary<uint, float> { [0] = -1.5f, [int.MaxValue] = float.NegativeInfinity }),
            g => g with { LogitBias = new Dictionary<int, float> { [0] = -1.5f, [int.MaxValue] = float.NegativeInfinity } }),
        ["stopping.max_tokens"] = (r => r.Stopping.MaxTokens = 0, g => g with { MaxTokens = 0 }),
        ["stopping.min_tokens"] = (r => r.Stopping.MinTokens = 5, g => g with { MinTokens = 5 }),
        ["stopping.stop_token_ids"] = (r => r.Stopping.StopTokenIds.Add([9, 0]), g => g with { StopTokenIds = [9, 0] }),
        ["stopping.stop_strings"] = (r => r.Stopping.StopStrings.Add(["b", "a"]), g => g with { StopStrings = ["b", "a"] }),
        ["stopping.ignore_eos"] = (r => r.Stopping.IgnoreEos = true, g => g with { IgnoreEos = true }),
        ["top_logprobs"] = (r => r.TopLogprobs = 4, g => g with { TopLogProbs = 4 }),
        ["prompt_logprobs"] = (r => r.PromptLogprobs = true, g => g with { PromptLogProbs = true }),
        ["stream"] = (r => r.Stream = true, g => g with { StreamTokens = true }),
        ["return_text"] = (r => r.ReturnText = true, g => g), // affects the reply only
        ["cache_salt"] = (r => r.CacheSalt = "salt", g => g with { CacheSalt = "salt" }),
        ["max_staleness"] = (r => r.MaxStaleness = 0, g => g with { MaxStaleness = 0 }),
    };

    private static readonly Dictionary<string, (Action<ScoreRequest> Set, Func<GroupRequest, GroupRequest> Expected)> s_score = new()
    {
        ["request_id"] = (r => r.RequestId = "mine", g => g with { Id = "mine" }),
        ["ids.ids"] = (r => r.Ids = new TokenIds { Ids = { 4, 0 } }, g => g with { Prompt = [4, 0] }),
        ["text"] = (r => r.Text = "aé", g => g with { Prompt = [0x61, 0xC3, 0xA9] }),
        ["top"] = (r => r.Top = 2, g => g with { PromptTop = 2 }),
        ["cache_salt"] = (r => r.CacheSalt = "salt", g => g with { CacheSalt = "salt" }),
    };

    private static GenerateRequest Plain => new()
    {
        RequestId = "r",
        PromptIds = new TokenIds { Ids = { 1 } },
        Seed = 0,
        Sampling = new SamplingParams(),
        Stopping = new StoppingParams(),
    };

    /// <summary>With a seed, because the server chooses a random one otherwise.</summary>
    private static readonly GroupRequest s_plain = new() { Id = "r", Prompt = [1], Seed = 0 };

    private static readonly GroupRequest s_plainScore = new() { Id = "r", Prompt = [1], MaxTokens = 0, PromptLogProbs = true };

    [Fact]
    public void Every_field_of_a_request_reaches_the_engine_and_changes_nothing_else()
    {
        Assert.Equal(Leaves(GenerateRequest.Descriptor).Order(), s_generate.Keys.Order());
        AssertSame(s_plain, new RequestConverter(s_bytes).Convert(Plain), "defaults");
        GenerateRequest bare = Plain;
        (bare.Sampling, bare.Stopping) = (null, null);
        AssertSame(s_plain, new RequestConverter(s_bytes).Convert(bare), "without sampling and stopping");
        foreach ((string field, (Action<GenerateRequest> set, Func<GroupRequest, GroupRequest> expected)) in s_generate)
        {
            GenerateRequest request = Plain;
            set(request);
            RequestConverter converter = new(s_bytes);
            AssertSame(expected(s_plain), converter.Convert(request), field);
            Assert.Empty(converter.Problems);
        }
    }

    [Fact]
    public void Every_field_of_a_score_reaches_the_engine_and_changes_nothing_else()
    {
        ScoreRequest Score() => new() { RequestId = "r", Ids = new TokenIds { Ids = { 1 } } };
        Assert.Equal(Leaves(ScoreRequest.Descriptor).Order(), s_score.Keys.Order());
        AssertSame(s_plainScore, new RequestConverter(s_bytes).Convert(Score()), "defaults");
        foreach ((string field, (Action<ScoreRequest> set, Func<GroupRequest, GroupRequest> expected)) in s_score)
        {
            ScoreRequest request = Score();
            set(request);
            AssertSame(expected(s_plainScore), new RequestConverter(s_bytes).Convert(request), field);
        }
    }

    [Fact]
    public void Values_that_the_engine_cannot_represent_are_problems_under_their_own_names()
    {
        (string Field, Action<GenerateRequest> Set)[] cases =
        [
            ("n", r => r.N = TooMuch),
            ("prompt_ids[1]", r => r.PromptIds = new TokenIds { Ids = { int.MaxValue, TooMuch } }),
            ("sampling.top_k", r => r.Sampling.TopK = TooMuch),
            ($"sampling.logit_bias[{TooMuch}]", r => r.Sampling.LogitBias[TooMuch] = 1),
            ("stopping.max_tokens", r => r.Stopping.MaxTokens = TooMuch),
            ("stopping.min_tokens", r => r.Stopping.MinTokens = TooMuch),
            ("stopping.stop_token_ids[0]", r => r.Stopping.StopTokenIds.Add(TooMuch)),
            ("top_logprobs", r => r.TopLogprobs = TooMuch),
            ("max_staleness", r => r.MaxStaleness = TooMuch),
            ("prompt", r => r.ClearPrompt()),
        ];
        foreach ((string field, Action<GenerateRequest> set) in cases)
        {
            GenerateRequest request = Plain;
            set(request);
            RequestConverter converter = new(s_bytes);
            converter.Convert(request);
            Assert.Equal(field, Assert.Single(converter.Problems).Field);
        }

        GenerateRequest text = Plain;
        (text.PromptText, text.ReturnText) = ("text", true);
        text.Stopping.StopStrings.Add("x");
        RequestConverter without = new(tokenizer: null);
        without.Convert(text);
        Assert.Equal(["prompt_text", "return_text", "stopping.stop_strings"], without.Problems.Select(problem => problem.Field).Order());
    }

    /// <summary>A field that is new in the engine needs its name here before a client can be told what is wrong with it.</summary>
    [Fact]
    public void Every_field_of_the_engines_request_has_its_name_on_the_wire()
    {
        InvalidRequestException all = new(
            [.. typeof(GroupRequest).GetProperties().Select(field => new Engine.Problem(field.Name, "is bad"))]);
        string[] generate = [.. FieldNames.Generate.Rename(all).Problems.Select(problem => problem.Field)];
        string[] score = [.. FieldNames.Score.Rename(all).Problems.Select(problem => problem.Field)];
        string[] known = [.. Leaves(GenerateRequest.Descriptor), "prompt_ids", "top"]; // top is a score's
        Assert.Equal(generate.Distinct(), generate.Intersect(known));
        Assert.Equal(["ids"], score.Except(generate));
        Assert.Equal(["prompt_ids"], generate.Except(score));

        InvalidRequestException ofOne = new(
            [new("Prompt[3]", "is bad"), new("stopping.stop_strings", "is bad"), new("N", "{other}", "MaxTokens")]);
        Assert.Equal("prompt_ids[3]: is bad; stopping.stop_strings: is bad; n: max_tokens", FieldNames.Generate.Rename(ofOne).Message);
        Assert.Equal("ids[3]: is bad; stopping.stop_strings: is bad; n: max_tokens", FieldNames.Score.Rename(ofOne).Message);
    }

    [Fact]
    public void Every_field_of_a_begin_reaches_the_engine_and_changes_nothing_else()
    {
        static V1.ManifestTensor Tensor(Action<V1.ManifestTensor>? change = null)
        {
            V1.ManifestTensor tensor = new() { Name = "w", Dtype = TensorDType.Bf16, Shape = { 2, 3 } };
            change?.Invoke(tensor);
            return tensor;
        }

        static UpdateManifest With(UpdateManifest manifest, Func<Engine.ManifestTensor, Engine.ManifestTensor> change)
            => manifest with { Tensors = [change(manifest.Tensors[0])] };

        Engine.ManifestTensor tensor = new("w", DType.BFloat16, [2, 3], 0);
        UpdateManifest plain = new() { Tensors = [tensor], PayloadBytes = 0, BaseVersion = 0, NewVersion = 0 };
        (string Field, Action<BeginUpdate> Set, Func<UpdateManifest, UpdateManifest> Expected)[] cases =
        [
            ("manifest.name", b => b.Manifest[0].Name = "v", m => With(m, t => t with { Name = "v" })),
            ("manifest.dtype", b => b.Manifest[0].Dtype = TensorDType.F16, m => With(m, t => t with { Type = DType.Float16 })),
            ("manifest.dtype", b => b.Manifest[0].Dtype = TensorDType.F32, m => With(m, t => t with { Type = DType.Float32 })),
            ("manifest.dtype", b => b.Manifest[0].Dtype = TensorDType.Unspecified, m => With(m, t => t with { Type = (DType)(-1) })),
            ("manifest.dtype", b => b.Manifest[0].Dtype = (TensorDType)9, m => With(m, t => t with { Type = (DType)(-1) })),
            ("manifest.shape", b => b.Manifest[0] = Tensor(t => t.Shape.Add(4)), m => With(m, t => t with { Shape = [2, 3, 4] })),
            ("manifest.shape", b => b.Manifest[0] = Tensor(t => t.Shape[1] = ulong.MaxValue),
                m => With(m, t => t with { Shape = [2, long.MaxValue] })),
            ("manifest.offset", b => b.Manifest[0].Offset = long.MaxValue, m => With(m, t => t with { Offset = long.MaxValue })),
            ("manifest.sparse_count", b => b.Manifest[0].SparseCount = 0, m => With(m, t => t with { SparseCount = 0 })),
            ("manifest.sparse_count", b => b.Manifest[0].SparseCount = ulong.MaxValue,
                m => With(m, t => t with { SparseCount = long.MaxValue })),
            ("manifest.first_row", b => b.Manifest[0].FirstRow = 5, m => With(m, t => t with { FirstRow = 5 })),
            ("manifest.first_row", b => b.Manifest[0].FirstRow = ulong.MaxValue, m => With(m, t => t with { FirstRow = long.MaxValue })),
            ("manifest.rows", b => b.Manifest[0].Rows = 5, m => With(m, t => t with { Rows = 5 })),
            ("manifest.rows", b => b.Manifest[0].Rows = ulong.MaxValue, m => With(m, t => t with { Rows = long.MaxValue })),
            ("payload_bytes", b => b.PayloadBytes = long.MaxValue, m => m with { PayloadBytes = long.MaxValue }),
            ("base_version", b => b.BaseVersion = ulong.MaxValue, m => m with { BaseVersion = ulong.MaxValue }),
            ("new_version", b => b.NewVersion = ulong.MaxValue, m => m with { NewVersion = ulong.MaxValue }),
            ("policy", b => b.Policy = V1.UpdatePolicy.Recompute, m => m),
            ("policy", b => b.Policy = V1.UpdatePolicy.Keep, m => m with { Policy = Engine.UpdatePolicy.Keep }),
            ("policy", b => b.Policy = V1.UpdatePolicy.Drain, m => m with { Policy = Engine.UpdatePolicy.Drain }),
            ("policy", b => b.Policy = V1.UpdatePolicy.Abort, m => m with { Policy = Engine.UpdatePolicy.Abort }),
            ("mode", b => b.Mode = V1.UpdateMode.Staged, m => m with { Mode = Engine.UpdateMode.Staged }),
            ("mode", b => b.Mode = V1.UpdateMode.InPlace, m => m with { Mode = Engine.UpdateMode.InPlace }),
            ("owner", b => b.Owner = new string('o', 256), m => m with { Owner = new string('o', 256) }),
            ("partial", b => b.Partial = true, m => m with { Partial = true }),
            ("deadline_milliseconds", b => b.DeadlineMilliseconds = 5, m => m), // used by the transaction, as is the next
            ("segment_bytes", b => b.SegmentBytes = 5, m => m),
            ("manifest.part", b => b.Manifest[0].Part = 5, m => With(m, t => t with { Part = 5 })),
            ("manifest.part", b => b.Manifest[0].Part = uint.MaxValue, m => With(m, t => t with { Part = int.MaxValue })),
            ("joined_payload_bytes", b => b.JoinedPayloadBytes.Add(long.MaxValue), m => m with { JoinedPayloadBytes = [long.MaxValue] }),
        ];
        Assert.Equal(Leaves(BeginUpdate.Descriptor).Order(), cases.Select(c => c.Field).Distinct().Order());
        foreach ((string field, Action<BeginUpdate> set, Func<UpdateManifest, UpdateManifest> expected) in cases)
        {
            BeginUpdate begin = new() { Manifest = { Tensor() } };
            set(begin);
            (UpdateManifest manifest, IReadOnlyList<Engine.Problem> problems) = ManifestConverter.Convert(begin);
            Assert.Empty(problems);
            AssertSame(expected(plain), manifest, field);
        }

        (string Field, Action<BeginUpdate> Set)[] wrong =
        [
            ("manifest", b => b.Manifest.Clear()),
            ("manifest['w']", b => b.Manifest[0].Offset = long.MaxValue + 1ul),
            ("manifest['w']", b => b.Manifest[0].Shape.Add(Enumerable.Repeat(1ul, 7))),
            ("payload_bytes", b => b.PayloadBytes = long.MaxValue + 1ul),
            ("owner", b => b.Owner = new string('o', 257)),
            ("policy", b => b.Policy = (V1.UpdatePolicy)5),
            ("mode", b => b.Mode = (V1.UpdateMode)(-1)),
            ("99", b => b.MergeFrom([0x98, 0x06, 0x01])),
            ("manifest.99", b => b.MergeFrom([0x0A, 0x03, 0x98, 0x06, 0x01])),
        ];
        foreach ((string field, Action<BeginUpdate> set) in wrong)
        {
            BeginUpdate begin = new() { Manifest = { Tensor() } };
            set(begin);
            Assert.Equal(field, Assert.Single(ManifestConverter.Convert(begin).Problems).Field);
        }
    }

    /// <summary>Every message a client may send, with a field of its next version, at the top or in any message inside.</summary>
    [Fact]
    public void Unknown_fields_are_found_at_any_depth()
    {
        MessageDescriptor[] sent = [.. new[] { RolloutReflection.Descriptor, WeightsReflection.Descriptor, ControlReflection.Descriptor }
            .SelectMany(file => file.Services).SelectMany(service => service.Methods).Select(method => method.InputType)];
        foreach (MessageDescriptor type in sent)
        {
            Assert.Empty(UnknownFields.Of(type.Parser.ParseFrom([])));
            foreach ((string path, byte[] bytes) in Unknown(type))
                Assert.Equal(path, Assert.Single(UnknownFields.Of(type.Parser.ParseFrom(bytes))).Field);
        }

        static IEnumerable<(string Path, byte[] Bytes)> Unknown(MessageDescriptor type)
        {
            yield return ("99", [0x98, 0x06, 0x01]);
            yield return ("98", [0x92, 0x06, 0x02, 0x08, 0x01]);
            foreach (FieldDescriptor field in type.Fields.InFieldNumberOrder().Where(f => f.FieldType == FieldType.Message && !f.IsMap))
            {
                foreach ((string path, byte[] bytes) in Unknown(field.MessageType))
                    yield return ($"{field.Name}.{path}", [(byte)((field.FieldNumber << 3) | 2), (byte)bytes.Length, .. bytes]);
            }
        }
    }

    /// <summary>A client reacts differently to each: it waits, sends less, tries another server or fixes the request.</summary>
    [Fact]
    public void Every_kind_of_error_has_its_status()
    {
        (Exception Error, StatusCode? Code)[] kinds =
        [
            (new InvalidRequestException([new("n", "is bad")]), StatusCode.InvalidArgument),
            (new UpdateRejectedException([new("n", "is bad")]), StatusCode.InvalidArgument),
            (new NoRoomException("full"), StatusCode.ResourceExhausted),
            (new EngineStateException(Engine.EngineState.Sleeping, "asleep"), StatusCode.FailedPrecondition),
            (new UpdateFailedException(UpdateFailure.Digest, "differs"), StatusCode.Aborted),
            (new ScoreFailedException(Engine.FinishReason.Abort, "aborted"), StatusCode.Aborted),
            (new ScoreFailedException(Engine.FinishReason.Error, "no token"), StatusCode.Internal),
            (new EngineFaultedException("lost"), StatusCode.Unavailable),
            (new Hosting.NotServingException("loading"), StatusCode.Unavailable),
            (new TaskCanceledException(), StatusCode.Cancelled),
            (new RpcException(new Status(StatusCode.Unimplemented, "no")), StatusCode.Unimplemented),
            (new InvalidOperationException("a bug"), null),
        ];
        foreach ((Exception error, StatusCode? code) in kinds) Assert.Equal(code, Errors.ToStatus(error)?.StatusCode);
        Assert.Equal("SLEEPING: asleep", Errors.ToStatus(kinds[3].Error)!.Value.Detail);
    }

    /// <summary>Field paths of all that is not a message itself.</summary>
    private static IEnumerable<string> Leaves(MessageDescriptor type) => type.Fields.InFieldNumberOrder().SelectMany(
        field => field.FieldType == FieldType.Message && !field.IsMap
            ? Leaves(field.MessageType).Select(inner => $"{field.Name}.{inner}")
            : [field.Name]);

    private static void AssertSame<T>(T expected, T actual, string field)
    {
        foreach (System.Reflection.PropertyInfo property in typeof(T).GetProperties())
        {
            Assert.True(Text(property.GetValue(expected)) == Text(property.GetValue(actual)),
                $"{field}: {property.Name} is {Text(property.GetValue(actual))}, not {Text(property.GetValue(expected))}");
        }

        static string Text(object? value) => value switch
        {
            string text => $"'{text}'",
            Engine.ManifestTensor tensor => $"{tensor.Name} {tensor.Type} {Text(tensor.Shape)} {tensor.Offset} {Text(tensor.SparseCount)} "
                + $"{tensor.FirstRow} {Text(tensor.Rows)} {tensor.Part}",
            System.Collections.IEnumerable many => string.Join(" ", many.Cast<object>().Select(Text)),
            null => "none",
            _ => $"{value}",
        };
    }
}
