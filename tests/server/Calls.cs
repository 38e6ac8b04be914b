using Grpc.Core;
using Rollout.V1;

namespace Rollout.Server.Tests;

/// <summary>Helpers for requests and their complete replies.</summary>
internal static class Calls
{
    /// <summary>A request for greedy tokens, with changes by the test.</summary>
    public static GenerateRequest Greedy(uint[] prompt, uint maxTokens, Action<GenerateRequest>? change = null)
    {
        GenerateRequest request = new()
        {
            PromptIds = new TokenIds { Ids = { prompt } },
            Sampling = new SamplingParams { Temperature = 0 },
            Stopping = new StoppingParams { MaxTokens = maxTokens, IgnoreEos = true },
        };
        change?.Invoke(request);
        return request;
    }

    /// <summary>A request for seeded random tokens.</summary>
    public static GenerateRequest Sampled(uint[] prompt, uint maxTokens, ulong seed, uint n = 1, Action<GenerateRequest>? change = null)
    {
        GenerateRequest request = Greedy(prompt, maxTokens);
        request.Sampling = new SamplingParams();
        request.Seed = seed;
        request.N = n;
        change?.Invoke(request);
        return request;
    }

    public static async Task<List<GenerateReply>> RepliesAsync(this TestServer server, GenerateRequest request)
    {
        using AsyncServerStreamingCall<GenerateReply> call = server.Rollout.Generate(request, deadline: Deadline());
        return await call.ResponseStream.ReadAllAsync().ToListAsync();
    }

    /// <summary>The group's samples by index, chunks joined.</summary>
    public static async Task<List<SampleChunk>> SamplesAsync(this TestServer server, GenerateRequest request)
        => Join(await server.RepliesAsync(request));

    public static List<SampleChunk> Join(IEnumerable<GenerateReply> replies)
    {
        SortedDictionary<uint, SampleChunk> samples = [];
        foreach (SampleChunk chunk in replies.SelectMany(reply => reply.Samples))
        {
            if (!samples.TryGetValue(chunk.Index, out SampleChunk? sample))
            {
                Assert.Equal(0u, chunk.Start);
                samples.Add(chunk.Index, chunk.Clone());
                continue;
            }

            Assert.Equal((uint)sample.Ids.Count, chunk.Start);
            sample.Ids.Add(chunk.Ids);
            sample.Logprobs.Add(chunk.Logprobs);
            sample.SamplingLogprobs.Add(chunk.SamplingLogprobs);
            sample.Versions.Add(chunk.Versions);
            sample.Top?.Ids.Add(chunk.Top.Ids);
            sample.Top?.Logprobs.Add(chunk.Top.Logprobs);
            sample.OldestKvVersion = chunk.OldestKvVersion;
            sample.Text += chunk.Text;
            sample.FinishReason = chunk.FinishReason;
        }

        return [.. samples.Values];
    }

    /// <summary>The same message, changed.</summary>
    public static T With<T>(this T message, Action<T> change)
    {
        change(message);
        return message;
    }

    /// <summary>A deadline for every call of the tests.</summary>
    public static DateTime Deadline(double seconds = 30) => DateTime.UtcNow.AddSeconds(seconds);

    public static async Task<RpcException> FailsAsync(Func<Task> call, StatusCode code)
    {
        RpcException failure = await Assert.ThrowsAsync<RpcException>(call);
        Assert.True(failure.StatusCode == code, $"expected {code}, got {failure.Status}");
        return failure;
    }
}
