using CsCheck;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.V1;
using SampleChunk = Rollout.V1.SampleChunk;

namespace Rollout.Server.Tests;

/// <summary>
/// The same request gives the same bits over gRPC and in process: on one side the server as users start it, streaming or not, on the
/// other an engine with one thread, narrow vectors and chunks of seven tokens.
/// </summary>
public sealed class DeterminismTests(SharedServer shared)
{
    private static readonly Gen<GenerateRequest> s_request =
        from prompt in Gen.UInt[3, 319].Array[1, 80]
        from n in Gen.UInt[1, 5]
        from seed in Gen.ULong
        from maxTokens in Gen.UInt[1, 40]
        from temperature in Gen.OneOf(0f, 0.8f, 1f)
        from topK in Gen.OneOf(0u, 30u)
        from topP in Gen.OneOf(1f, 0.8f)
        from stream in Gen.Bool
        select Calls.Sampled(prompt, maxTokens, seed, n, request =>
        {
            request.Sampling = new SamplingParams { Temperature = temperature, TopK = topK, TopP = topP };
            request.Stream = stream;
        });

    [Fact]
    public async Task Over_gRPC_or_in_process()
    {
        await using RolloutEngine engine = RolloutEngine.Load(Golden.Folder("qwen3"), new CpuBackend(1, 128),
            new EngineOptions { MaxBatchTokens = 7, MaxSequences = 3 });
        await s_request.SampleAsync(async request =>
        {
            List<SampleChunk> remote = await shared.Server.SamplesAsync(request);
            Group group = engine.Submit(new GroupRequest
            {
                Id = Guid.NewGuid().ToString(),
                Prompt = [.. request.PromptIds.Ids.Select(id => (int)id)],
                N = (int)request.N,
                Seed = request.Seed,
                Temperature = request.Sampling.Temperature,
                TopK = (int)request.Sampling.TopK,
                TopP = request.Sampling.TopP,
                MaxTokens = (int)request.Stopping.MaxTokens,
                IgnoreEos = true,
            });
            await group.Completed.WaitAsync(TimeSpan.FromSeconds(30));
            for (int i = 0; i < remote.Count; i++)
            {
                Sequence local = group.Sequences[i];
                int tokens = local.Published;
                Assert.Equal(local.Tokens(0, tokens).ToArray(), remote[i].Ids.Select(id => (int)id));
                Assert.Equal(Bits(local.LogProbs(0, tokens).ToArray()), Bits(remote[i].Logprobs));
                Assert.Equal(Bits(local.SamplingLogProbs(0, tokens).ToArray()), Bits(remote[i].SamplingLogprobs));
            }

            Assert.Equal((int)request.N, remote.Count);
        }, iter: 60, threads: 1);
    }

    private static IEnumerable<int> Bits(IEnumerable<float> values) => values.Select(BitConverter.SingleToInt32Bits);
}
