using System.Runtime.CompilerServices;
using Rollout.Engine;

namespace Rollout.Server.Generation;

/// <summary>Data of a group as a whole and of its prompt.</summary>
/// <param name="Seed">Sample i draws with (seed, i).</param>
/// <param name="PromptIds">Only where the prompt was text, else empty.</param>
/// <param name="PromptLogProbs">Of prompt tokens 1.., if requested and computed, else empty.</param>
/// <param name="CachedPromptTokens">Prompt tokens whose keys and values came from the prefix cache.</param>
internal sealed record GroupHead(ulong Seed, int[] PromptIds, float[] PromptLogProbs, int CachedPromptTokens);

/// <summary>New tokens of one sample, and their text: "" unless requested.</summary>
internal readonly record struct TextChunk(SequenceChunk Chunk, string Text);

/// <summary>The new tokens of a group since its last reply.</summary>
/// <param name="Head">With the first reply only.</param>
/// <param name="Chunks">At least one. The stream's own list: read it before asking for the next reply.</param>
internal readonly record struct GroupReply(GroupHead? Head, IReadOnlyList<TextChunk> Chunks);

/// <summary>
/// One group between the engine and its client, in the engine's terms; each surface converts it to its own. Disposing it ends the group if
/// it is still running.
/// </summary>
internal sealed class GroupStream : IAsyncDisposable
{
    private readonly RolloutEngine _engine;
    private readonly Group _group;
    private readonly bool _promptWasText;
    private readonly TextStream[]? _texts;

    private GroupStream(RolloutEngine engine, Group group, bool promptWasText, bool returnText)
    {
        _engine = engine;
        _group = group;
        _promptWasText = promptWasText;
        if (!returnText) return;
        _texts = new TextStream[group.Sequences.Count];
        for (int i = 0; i < _texts.Length; i++) _texts[i] = new TextStream(engine.Tokenizer!, group.Request.StopStrings);
    }

    public GroupRequest Request => _group.Request;

    /// <summary>Submits a group.</summary>
    /// <param name="engine">The engine.</param>
    /// <param name="request">The request.</param>
    /// <param name="promptWasText">Whether the client sent text, so that the reply must include the prompt's tokens.</param>
    /// <param name="returnText">Return text as well as tokens; needs a tokenizer.</param>
    /// <param name="alsoWrong">Problems that the caller has found already; listed with the engine's.</param>
    /// <exception cref="InvalidRequestException">Lists everything wrong with the request.</exception>
    /// <exception cref="NoRoomException">Try again later.</exception>
    public static GroupStream Start(
        RolloutEngine engine, GroupRequest request, bool promptWasText, bool returnText, ProblemList alsoWrong)
        => new(engine, Submit(engine, request, alsoWrong), promptWasText, returnText);

    /// <summary>Scores the prompt of a request. The result is in the group.</summary>
    /// <exception cref="InvalidRequestException">Lists everything wrong with the request.</exception>
    /// <exception cref="NoRoomException">Try again later.</exception>
    /// <exception cref="ScoreFailedException">It was aborted or failed.</exception>
    public static async Task<Group> ScoreAsync(
        RolloutEngine engine, GroupRequest request, ProblemList alsoWrong, CancellationToken cancellation)
    {
        Group group = Submit(engine, request, alsoWrong);
        try
        {
            await group.Completed.WaitAsync(cancellation);
        }
        finally
        {
            if (!group.Completed.IsCompleted) await engine.AbortAsync(group); // the client has disconnected
        }

        Sequence sample = group.Sequences[0];
        if (sample.FinishReason == FinishReason.Abort)
            throw new ScoreFailedException(FinishReason.Abort, "the request was aborted before it was scored");
        if (sample.FinishReason == FinishReason.Error)
        {
            ThrowIfFaulted(engine);
            throw new ScoreFailedException(FinishReason.Error, sample.Error);
        }

        return group;
    }

    /// <summary>
    /// Replies until every sample has ended: one for each sample, or, for a stream, all tokens since the previous reply, so that a slow
    /// reader gets fewer and longer replies.
    /// </summary>
    /// <exception cref="EngineFaultedException">
    /// At the end, when samples ended because the engine failed: the group must not look complete.
    /// </exception>
    public async IAsyncEnumerable<GroupReply> ReadAsync([EnumeratorCancellation] CancellationToken cancellation)
    {
        int most = Request.StreamTokens ? _group.Sequences.Count : 1;
        List<TextChunk> reply = [];
        await using IAsyncEnumerator<SequenceChunk> chunks = _group.ReadAsync(cancellation).GetAsyncEnumerator(cancellation);
        bool more = await chunks.MoveNextAsync();
        for (bool first = true; more; first = false)
        {
            GroupHead? head = first ? Head(chunks.Current) : null;
            reply.Clear();
            ValueTask<bool> next;
            while (true)
            {
                reply.Add(WithText(chunks.Current));
                next = chunks.MoveNextAsync();
                if (reply.Count == most || !next.IsCompletedSuccessfully) break;
                more = next.Result;
                next = new ValueTask<bool>(more);
                if (!more) break;
            }

            yield return new GroupReply(head, reply);
            more = await next;
        }

        ThrowIfFaulted(_engine);
    }

    /// <summary>Ends the samples that are still running; their reader gets the partial tokens.</summary>
    public Task AbortAsync() => _group.Completed.IsCompleted ? Task.CompletedTask : _engine.AbortAsync(_group);

    public async ValueTask DisposeAsync() => await AbortAsync();

    private static Group Submit(RolloutEngine engine, GroupRequest request, ProblemList alsoWrong)
    {
        if (alsoWrong.Count == 0) return engine.Submit(request);

        // Problems that the engine finds in the rest belong in the same answer.
        RequestValidator validator = new(engine.Model.VocabSize, engine.MaxContext, hasTokenizer: true);
        ProblemList problems = new(alsoWrong);
        problems.AddRange(validator.Validate(request));
        throw new InvalidRequestException(problems);
    }

    private static void ThrowIfFaulted(RolloutEngine engine)
    {
        if (engine.Status is { State: EngineState.Faulted } status) throw new EngineFaultedException(status.Reason);
    }

    private GroupHead Head(in SequenceChunk chunk)
    {
        // A group that ended before its prompt was computed has no log-probabilities, and zeros would look like valid ones.
        bool computed = chunk.End > 0 || chunk.FinishReason is FinishReason.Stop or FinishReason.Length;
        float[] logProbs = computed ? _group.PromptLogProbs : [];
        return new GroupHead(Request.Seed, _promptWasText ? Request.Prompt : [], logProbs, _group.CachedPromptTokens);
    }

    private TextChunk WithText(in SequenceChunk chunk)
    {
        Sequence sample = chunk.Sequence;
        bool last = chunk.FinishReason != FinishReason.None;
        string? matched = chunk.FinishReason == FinishReason.Stop ? sample.MatchedStop : null;
        string text = _texts?[sample.Index].Append(sample.Tokens(chunk.Start, chunk.End), last, matched) ?? "";
        return new TextChunk(chunk, text);
    }
}

/// <summary>A score that was aborted or failed.</summary>
internal sealed class ScoreFailedException(FinishReason reason, string message) : Exception(message)
{
    /// <summary>Abort or error.</summary>
    public FinishReason Reason { get; } = reason;
}
