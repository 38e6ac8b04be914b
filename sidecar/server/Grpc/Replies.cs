using System.Runtime.InteropServices;
using Google.Protobuf;
using Google.Protobuf.Collections;
using Rollout.Server.Generation;
using Rollout.V1;

namespace Rollout.Server.Grpc;

/// <summary>Converts the engine's arrays to packed fields: one copy per array, no object per token.</summary>
internal static class Replies
{
    public static GenerateReply Reply(string requestId, in GroupReply group)
    {
        GenerateReply reply = new() { RequestId = requestId };
        if (group.Head is { } head)
        {
            reply.Seed = head.Seed;
            reply.Prompt = new PromptInfo { CachedTokens = (uint)head.CachedPromptTokens };
            AddIds(reply.Prompt.Ids, head.PromptIds);
            reply.Prompt.Logprobs.AddRange((ReadOnlySpan<float>)head.PromptLogProbs);
        }

        foreach (TextChunk chunk in group.Chunks) reply.Samples.Add(Chunk(chunk.Chunk, chunk.Text));
        return reply;
    }

    public static ScoreReply Score(Engine.Group group)
    {
        Engine.GroupRequest request = group.Request;
        ScoreReply reply = new() { RequestId = request.Id, Version = group.PromptVersion };
        AddIds(reply.Ids, request.Prompt);
        reply.Logprobs.AddRange((ReadOnlySpan<float>)group.PromptLogProbs);
        if (request.PromptTop > 0) reply.Top = Top(request.PromptTop, group.PromptTopIds, group.PromptTopLogProbs);
        return reply;
    }

    private static SampleChunk Chunk(in Engine.SequenceChunk chunk, string text)
    {
        (Engine.Sequence sample, int start, int end, Engine.FinishReason reason) = chunk;
        SampleChunk reply = new()
        {
            Index = (uint)sample.Index,
            Start = (uint)start,
            OldestKvVersion = sample.OldestKvVersion,
            Text = text,
            FinishReason = ToWire(reason),
            Error = reason == Engine.FinishReason.Error ? sample.Error : "",
        };
        AddIds(reply.Ids, sample.Tokens(start, end));
        reply.Logprobs.AddRange(sample.LogProbs(start, end));
        reply.SamplingLogprobs.AddRange(sample.SamplingLogProbs(start, end));
        AddVersions(reply.Versions, sample.Versions(start, end), start);
        if (sample.TopLogProbs is > 0 and int k) reply.Top = Top(k, sample.TopIds(start, end), sample.TopLogProbValues(start, end));
        return reply;
    }

    /// <summary>Alternatives in the order [row][k].</summary>
    private static TopLogprobs Top(int k, ReadOnlySpan<int> ids, ReadOnlySpan<float> logProbs)
    {
        TopLogprobs top = new() { K = (uint)k };
        AddIds(top.Ids, ids);
        top.Logprobs.AddRange(logProbs);
        return top;
    }

    private static void AddIds(RepeatedField<uint> field, ReadOnlySpan<int> ids) => field.AddRange(MemoryMarshal.Cast<int, uint>(ids));

    private static FinishReason ToWire(Engine.FinishReason reason) => reason switch
    {
        Engine.FinishReason.None => FinishReason.Unspecified,
        Engine.FinishReason.Stop => FinishReason.Stop,
        Engine.FinishReason.Length => FinishReason.Length,
        Engine.FinishReason.Abort => FinishReason.Abort,
        _ => FinishReason.Error,
    };

    private static void AddVersions(RepeatedField<VersionSpan> field, ReadOnlySpan<ulong> versions, int start)
    {
        for (int from = 0; from < versions.Length;)
        {
            ulong version = versions[from];
            int length = versions[from..].IndexOfAnyExcept(version);
            int to = length < 0 ? versions.Length : from + length;
            field.Add(new VersionSpan { Version = version, Start = (uint)(start + from), End = (uint)(start + to) });
            from = to;
        }
    }
}
