using System.Runtime.CompilerServices;
using Google.Protobuf;
using Grpc.Core;
using Rollout.Engine;
using Rollout.Server.Generation;
using Rollout.V1;

namespace Rollout.Server.Grpc;

/// <summary>One group between the engine and whoever asked for it. Disposing it ends the group if it still runs.</summary>
internal sealed class GroupCall : IAsyncDisposable
{
    private readonly RolloutEngine _engine;
    private readonly Group _group;
    private readonly bool _promptWasText;
    private readonly TextStream[]? _texts;

    private GroupCall(RolloutEngine engine, Group group, GenerateRequest request)
    {
        _engine = engine;
        _group = group;
        _promptWasText = request.PromptCase == GenerateRequest.PromptOneofCase.PromptText;
        if (!request.ReturnText) return;
        _texts = new TextStream[group.Samples.Count];
        for (int i = 0; i < _texts.Length; i++) _texts[i] = new TextStream(engine.Tokenizer!, group.Request.StopStrings);
    }

    public GroupRequest Request => _group.Request;

    /// <exception cref="InvalidRequestException">Lists everything wrong with the request.</exception>
    /// <exception cref="NoRoomException">Try again later.</exception>
    public static GroupCall Start(RolloutEngine engine, GenerateRequest request)
    {
        RequestConverter converter = new(engine.Tokenizer);
        GroupRequest converted = converter.Convert(request);
        return new GroupCall(engine, Submit(engine, converted, converter.Problems), request);
    }

    /// <summary>Scores the prompt of a request to its end.</summary>
    public static async Task<ScoreReply> ScoreAsync(RolloutEngine engine, ScoreRequest request, CancellationToken cancellation)
    {
        RequestConverter converter = new(engine.Tokenizer);
        GroupRequest converted = converter.Convert(request);
        Group group;
        try
        {
            group = Submit(engine, converted, converter.Problems);
        }
        catch (InvalidRequestException e)
        {
            // The engine knows the fields of a group; here the prompt is called otherwise.
            throw new InvalidRequestException([.. e.Problems.Select(p => p with { Field = p.Field.Replace("prompt_ids", "ids") })]);
        }

        try
        {
            await group.Completed.WaitAsync(cancellation);
        }
        finally
        {
            if (!group.Completed.IsCompleted) await engine.AbortAsync(group); // whoever asked has gone
        }

        Sequence sample = group.Samples[0];
        if (sample.FinishReason is Engine.FinishReason.Abort)
            throw Failed(StatusCode.Aborted, "the request was aborted before it was scored");
        if (sample.FinishReason is Engine.FinishReason.Error)
        {
            ThrowIfFaulted(engine);
            throw Failed(StatusCode.Internal, sample.Error);
        }

        ScoreReply reply = new() { RequestId = converted.Id, Version = group.PromptVersion };
        Replies.AddIds(reply.Ids, converted.Prompt);
        reply.Logprobs.AddRange((ReadOnlySpan<float>)group.PromptLogProbs);
        if (converted.PromptTop > 0)
        {
            reply.Top = Replies.Top(converted.PromptTop, group.PromptTopIds, group.PromptTopLogProbs);
        }

        return reply;
    }

    /// <summary>
    /// Replies until every sample has ended: one a sample, or, for a stream, whatever has come since the last reply was taken, so that a
    /// slow reader gets fewer and longer ones.
    /// </summary>
    public async IAsyncEnumerable<GenerateReply> ReadAsync([EnumeratorCancellation] CancellationToken cancellation)
    {
        int most = Request.StreamTokens ? _group.Samples.Count : 1;
        await using IAsyncEnumerator<Engine.SampleChunk> chunks = _group.ReadAsync(cancellation).GetAsyncEnumerator(cancellation);
        bool more = await chunks.MoveNextAsync();
        for (bool first = true; more; first = false)
        {
            GenerateReply reply = new() { RequestId = Request.Id };
            if (first) Introduce(reply, chunks.Current);
            ValueTask<bool> next;
            while (true)
            {
                reply.Samples.Add(Convert(chunks.Current));
                next = chunks.MoveNextAsync();
                if (reply.Samples.Count == most || !next.IsCompletedSuccessfully) break;
                more = next.Result;
                next = new ValueTask<bool>(more);
                if (!more) break;
            }

            yield return reply;
            more = await next;
        }
    }

    /// <summary>Throws when samples ended because the engine failed: their stream must not look complete.</summary>
    public void ThrowIfFaulted() => ThrowIfFaulted(_engine);

    /// <summary>Ends the samples that still run; their reader gets the partial tokens.</summary>
    public Task AbortAsync() => _group.Completed.IsCompleted ? Task.CompletedTask : _engine.AbortAsync(_group);

    public async ValueTask DisposeAsync() => await AbortAsync();

    private static Group Submit(RolloutEngine engine, GroupRequest request, IReadOnlyList<Engine.Problem> problems)
    {
        if (problems.Count == 0) return engine.Submit(request);

        // What the engine finds wrong with the rest belongs in the same answer.
        RequestValidator validator = new(engine.Model.VocabSize, engine.MaxContext, hasTokenizer: true);
        throw new InvalidRequestException([.. problems, .. validator.Validate(request)]);
    }

    private static void ThrowIfFaulted(RolloutEngine engine)
    {
        if (engine.Status is { State: Engine.EngineState.Faulted } status) throw new EngineFaultedException(status.Reason);
    }

    private static RpcException Failed(StatusCode code, string message) => new(new Status(code, message));

    private void Introduce(GenerateReply reply, in Engine.SampleChunk chunk)
    {
        reply.Seed = Request.Seed;
        reply.Prompt = new PromptInfo { CachedTokens = (uint)_group.CachedPromptTokens };
        if (_promptWasText) Replies.AddIds(reply.Prompt.Ids, Request.Prompt);

        // A group that ended before its prompt was computed has no log-probabilities, and zeros would look like some.
        bool computed = chunk.End > 0 || chunk.FinishReason is Engine.FinishReason.Stop or Engine.FinishReason.Length;
        if (computed) reply.Prompt.Logprobs.AddRange((ReadOnlySpan<float>)_group.PromptLogProbs);
    }

    private V1.SampleChunk Convert(in Engine.SampleChunk chunk)
    {
        Sequence sample = chunk.Sample;
        bool last = chunk.FinishReason != Engine.FinishReason.None;
        string? matched = chunk.FinishReason == Engine.FinishReason.Stop ? sample.MatchedStop : null;
        string text = _texts?[sample.Index].Append(sample.Tokens(chunk.Start, chunk.End), last, matched) ?? "";
        return Replies.Chunk(chunk, text);
    }
}
