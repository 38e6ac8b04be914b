using System.Runtime.InteropServices;
using Google.Protobuf.Collections;
using Rollout.Engine;
using Rollout.Server.Generation;
using Rollout.V1;

namespace Rollout.Server.Grpc;

/// <summary>
/// Converts rollout.v1 requests to the engine's. Only values that the engine's types cannot represent are checked here (numbers beyond
/// int, a missing prompt, text without a tokenizer); the engine checks everything else. Problems are collected, not thrown.
/// </summary>
internal sealed class RequestConverter(Tokenizer? tokenizer) : RequestReader(tokenizer)
{
    public GroupRequest Convert(GenerateRequest request)
    {
        SamplingParams sampling = request.Sampling ?? s_sampling;
        StoppingParams stopping = request.Stopping ?? s_stopping;
        if (request.ReturnText) NeedTokenizer("return_text");
        if (stopping.StopStrings.Count > 0) NeedTokenizer("stopping.stop_strings");
        return new GroupRequest
        {
            Id = IdOrNew(request.RequestId),
            Prompt = request.PromptCase switch
            {
                GenerateRequest.PromptOneofCase.PromptIds => Ids(request.PromptIds.Ids, "prompt_ids"),
                GenerateRequest.PromptOneofCase.PromptText => Encode(request.PromptText, "prompt_text"),
                _ => Missing("prompt", "either prompt_ids or prompt_text must be given"),
            },
            N = request.HasN ? Int(request.N, "n") : 1,
            Seed = request.HasSeed ? request.Seed : RandomSeed(),
            Temperature = sampling.HasTemperature ? sampling.Temperature : 1,
            TopK = Int(sampling.TopK, "sampling.top_k"),
            TopP = sampling.HasTopP ? sampling.TopP : 1,
            MinP = sampling.MinP,
            LogitBias = Bias(sampling.LogitBias),
            MaxTokens = stopping.HasMaxTokens ? Int(stopping.MaxTokens, "stopping.max_tokens") : null,
            MinTokens = Int(stopping.MinTokens, "stopping.min_tokens"),
            StopTokenIds = Ids(stopping.StopTokenIds, "stopping.stop_token_ids"),
            StopStrings = [.. stopping.StopStrings],
            IgnoreEos = stopping.IgnoreEos,
            TopLogProbs = Int(request.TopLogprobs, "top_logprobs"),
            PromptLogProbs = request.PromptLogprobs,
            MaxStaleness = request.HasMaxStaleness ? Int(request.MaxStaleness, "max_staleness") : null,
            CacheSalt = request.CacheSalt,
            StreamTokens = request.Stream,
        };
    }

    public GroupRequest Convert(ScoreRequest request) => new()
    {
        Id = IdOrNew(request.RequestId),
        Prompt = request.InputCase switch
        {
            ScoreRequest.InputOneofCase.Ids => Ids(request.Ids.Ids, "ids"),
            ScoreRequest.InputOneofCase.Text => Encode(request.Text, "text"),
            _ => Missing("input", "either ids or text must be given"),
        },
        MaxTokens = 0,
        PromptLogProbs = true,
        PromptTop = Int(request.Top, "top"),
        CacheSalt = request.CacheSalt,
    };

    private static readonly SamplingParams s_sampling = new();
    private static readonly StoppingParams s_stopping = new();

    private int[] Ids(RepeatedField<uint> ids, string field)
    {
        if (ids.Count == 0) return [];
        uint[] wire = new uint[ids.Count];
        ids.CopyTo(wire, 0);
        int wrong = 0;
        for (int i = 0; i < wire.Length; i++)
        {
            if (wire[i] <= int.MaxValue) continue;
            // One is enough: a trainer that pads with -100 sends thousands.
            if (wrong++ == 0) Report($"{field}[{i}]", $"{wire[i]} is not a token id");
            wire[i] = 0;
        }

        return MemoryMarshal.Cast<uint, int>(wire).ToArray();
    }

    private Dictionary<int, float> Bias(MapField<uint, float> wire)
    {
        Dictionary<int, float> bias = new(wire.Count);
        foreach ((uint id, float value) in wire)
        {
            if (id <= int.MaxValue)
            {
                bias[(int)id] = value;
                continue;
            }

            Report($"sampling.logit_bias[{id}]", $"{id} is not a token id");
            break;
        }

        return bias;
    }

    private int Int(uint value, string field)
    {
        if (value <= int.MaxValue) return (int)value;
        Report(field, $"{value} is more than the largest value allowed, {int.MaxValue}");
        return 1;
    }
}
