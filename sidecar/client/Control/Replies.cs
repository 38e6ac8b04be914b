namespace Rollout.Client;

/// <param name="Groups">Groups ended by this call.</param>
/// <param name="Samples">Samples ended by this call.</param>
/// <param name="Unknown">Ids that are not in flight.</param>
public sealed record AbortResult(int Groups, int Samples, IReadOnlyList<string> Unknown);

/// <param name="State">State of the engine once the pause is in force.</param>
/// <param name="AbortedSamples">Samples ended with <see cref="PauseMode.Abort"/>, else 0.</param>
public sealed record PauseResult(EngineState State, int AbortedSamples);

/// <summary>Log-probabilities of given tokens.</summary>
/// <param name="Ids">The tokens scored.</param>
/// <param name="LogProbs">Model log-probability of <c>Ids[1..]</c>, each given the tokens before it: one less than ids.</param>
/// <param name="Top">
/// Alternatives for every position after the first and, in the last row, for the next token: one row per id. Null unless requested.
/// </param>
/// <param name="Version">Version of the weights that scored.</param>
public sealed record ScoreResult(int[] Ids, float[] LogProbs, TopLogProbs? Top, ulong Version);
