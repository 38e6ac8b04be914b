using Google.Protobuf;
using Grpc.Core;
using Rollout.V1;

namespace Rollout.Server.Tests;

/// <summary>Bad input gets one answer that lists all problems and names the fields; other requests are not affected.</summary>
public sealed class BadRequestTests(SharedServer shared)
{
    private static readonly uint[] s_prompt = Golden.Cases("qwen3")[1].Prompt;

    private readonly ServerProcess _server = shared.Server;

    private static readonly (Action<GenerateRequest> Break, string[] Fields)[] s_bad =
    [
        (r => r.ClearPrompt(), ["prompt"]),
        (r => r.PromptIds = new TokenIds(), ["prompt_ids"]),
        (r => r.PromptIds = new TokenIds { Ids = { 1, 320 } }, ["prompt_ids[1]"]),
        (r => r.PromptIds = new TokenIds { Ids = { 1, uint.MaxValue } }, ["prompt_ids[1]", "4294967295"]),
        (r => r.PromptIds = new TokenIds { Ids = { Enumerable.Repeat(5u, 600) } }, ["prompt_ids", "600", "512"]),
        (r => r.N = 0, ["n:"]),
        (r => r.N = uint.MaxValue, ["n:"]),
        (r => r.Sampling.Temperature = float.NaN, ["sampling.temperature"]),
        (r => r.Sampling.Temperature = float.PositiveInfinity, ["sampling.temperature"]),
        (r => r.Sampling.TopP = 0, ["sampling.top_p"]),
        (r => r.Sampling.TopP = float.NaN, ["sampling.top_p"]),
        (r => r.Sampling.MinP = 1.5f, ["sampling.min_p"]),
        (r => r.Sampling.TopK = 3_000_000_000, ["sampling.top_k"]),
        (r => r.Sampling.LogitBias[400] = 1, ["sampling.logit_bias"]),
        (r => r.Sampling.LogitBias[3_000_000_000] = 1, ["sampling.logit_bias[3000000000]"]),
        (r => r.Sampling.LogitBias[5] = float.NaN, ["sampling.logit_bias[5]"]),
        (r => r.Sampling.LogitBias[5] = float.PositiveInfinity, ["sampling.logit_bias[5]"]),
        (r => r.Stopping.MaxTokens = 0, ["stopping.max_tokens: 0 makes sense only with prompt_logprobs"]),
        (r => (r.Stopping.MaxTokens, r.PromptLogprobs, r.N) = (0, true, 2), ["n: must be 1 when max_tokens is 0"]),
        (r => r.Stopping.MaxTokens = 5000, ["stopping.max_tokens", "512"]),
        (r => r.Stopping.MinTokens = 100, ["stopping.min_tokens: 100 is more than max_tokens 8"]),
        (r => r.Stopping.StopTokenIds.Add(320), ["stopping.stop_token_ids[0]"]),
        (r => r.Stopping.StopStrings.Add(""), ["stopping.stop_strings"]),
        (r => r.TopLogprobs = 321, ["top_logprobs"]),
        (r => r.RequestId = new string('x', 300), ["request_id"]),
        (r => r.MergeFrom([0x98, 0x06, 0x01]), ["99", "newer"]), // field 99 of a client from the future
        (r => r.MergeFrom([0x32, 0x03, 0x98, 0x06, 0x01]), ["sampling.99"]),
        (r =>
        {
            r.N = 0;
            r.PromptIds.Ids.Add(3_000_000_000);
            r.Sampling.Temperature = -1;
            r.Sampling.TopP = 2;
            r.Sampling.TopK = uint.MaxValue;
            r.Stopping.StopTokenIds.Add(4000);
        }, ["n:", "prompt_ids[17]", "sampling.temperature", "sampling.top_p", "sampling.top_k", "stopping.stop_token_ids[0]"]),
    ];

    [Fact]
    public async Task Every_problem_is_named_and_other_requests_are_not_affected()
    {
        GenerateRequest good = Calls.Sampled(s_prompt, 300, seed: 11, n: 4);
        List<SampleChunk> alone = await _server.SamplesAsync(good);
        Task<List<SampleChunk>> beside = _server.SamplesAsync(good);
        foreach ((Action<GenerateRequest> breakIt, string[] fields) in s_bad)
        {
            GenerateRequest bad = Calls.Greedy(s_prompt, 8, breakIt);
            RpcException failure = await Calls.FailsAsync(() => _server.RepliesAsync(bad), StatusCode.InvalidArgument);
            Assert.All(fields, field => Assert.Contains(field, failure.Status.Detail, StringComparison.Ordinal));
        }

        List<SampleChunk> disturbed = await beside;
        Assert.Equal(alone.Select(sample => sample.Ids), disturbed.Select(sample => sample.Ids));
        Assert.Equal(alone.Select(sample => sample.Logprobs), disturbed.Select(sample => sample.Logprobs));
    }

    [Fact]
    public async Task Score_abort_and_pause_are_checked_too()
    {
        async Task Refuses(Func<Task> call, params string[] fields)
        {
            RpcException failure = await Calls.FailsAsync(call, StatusCode.InvalidArgument);
            Assert.All(fields, field => Assert.Contains(field, failure.Status.Detail, StringComparison.Ordinal));
        }

        await Refuses(() => _server.Rollout.ScoreAsync(new ScoreRequest()).ResponseAsync, "input");
        ScoreRequest score = new() { Ids = new TokenIds { Ids = { 999 } }, Top = 400 };
        RpcException bad = await Calls.FailsAsync(() => _server.Rollout.ScoreAsync(score).ResponseAsync, StatusCode.InvalidArgument);
        Assert.Equal("ids[0]: token 999 is outside the vocabulary of 320; top: must be between 0 and 320, is 400", bad.Status.Detail);
        await Refuses(() => _server.Rollout.AbortAsync(new AbortRequest()).ResponseAsync, "which");
        await Refuses(() => _server.Rollout.AbortAsync(new AbortRequest { All = false }).ResponseAsync, "all");
        await Refuses(() => _server.Control.PauseAsync(new PauseRequest()).ResponseAsync, "mode", "lease_milliseconds");
        await Refuses(() => _server.Control.PauseAsync(new PauseRequest { Mode = (PauseMode)9, LeaseMilliseconds = 1 }).ResponseAsync,
            "mode", "9");
    }

    [Fact]
    public async Task An_id_in_flight_is_refused_and_free_again_afterwards()
    {
        GenerateRequest first = Calls.Sampled(s_prompt, 480, seed: 1, n: 128, change: r =>
        {
            r.RequestId = "twice";
            r.Stream = true;
        });
        using AsyncServerStreamingCall<GenerateReply> call = _server.Rollout.Generate(first, deadline: Calls.Deadline());
        Assert.True(await call.ResponseStream.MoveNext(default));
        GenerateRequest second = Calls.Greedy(s_prompt, 4, r => r.RequestId = "twice");
        RpcException failure = await Calls.FailsAsync(() => _server.RepliesAsync(second), StatusCode.InvalidArgument);
        Assert.Contains("request_id", failure.Status.Detail, StringComparison.Ordinal);
        AbortReply aborted = await _server.Rollout.AbortAsync(new AbortRequest { Ids = new RequestIds { Ids = { "twice", "never" } } });
        Assert.Equal(1u, aborted.Groups);
        Assert.Equal(["never"], aborted.Unknown);
        List<SampleChunk> rest = [];
        await foreach (GenerateReply reply in call.ResponseStream.ReadAllAsync()) rest.AddRange(reply.Samples);
        Assert.Contains(rest, sample => sample.FinishReason == FinishReason.Abort);
        Assert.Single(await _server.SamplesAsync(second));
    }

    [Fact]
    public async Task Bytes_that_are_no_message_affect_no_other_call()
    {
        Method<byte[], byte[]> method = new(MethodType.ServerStreaming, "rollout.v1.RolloutService", "Generate",
            Marshallers.Create(bytes => bytes, bytes => bytes), Marshallers.Create(bytes => bytes, bytes => bytes));
        CallInvoker invoker = _server.Channel.CreateCallInvoker();
        await Assert.ThrowsAsync<RpcException>(async () =>
        {
            using AsyncServerStreamingCall<byte[]> call = invoker.AsyncServerStreamingCall(
                method, null, new CallOptions(deadline: Calls.Deadline()), [0x0A, 0xFF, 0xFF]);
            await call.ResponseStream.MoveNext(default);
        });
        Assert.Single(await _server.SamplesAsync(Calls.Greedy(s_prompt, 1)));
    }
}
