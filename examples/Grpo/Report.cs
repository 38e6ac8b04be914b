using System.Globalization;
using Spectre.Console;

namespace Rollout.Examples.Grpo;

/// <summary>One step as shown on the terminal.</summary>
public sealed record StepReport(
    int Step, double Reward, GrpoStats Stats, long Tokens, TimeSpan Sampling, TimeSpan Training, TimeSpan Update, TimeSpan Elapsed);

/// <summary>Reports the run: a line for each step, and at the end a table and a plot.</summary>
public sealed class Report(Options options)
{
    private readonly List<StepReport> _steps = [];
    private readonly List<(int Step, double Accuracy)> _heldOut = [];

    /// <summary>Mean reward of the last ten steps, or 0 while there are fewer.</summary>
    public double RecentReward => _steps.Count < 10 ? 0 : _steps.TakeLast(10).Average(s => s.Reward);

    public int StepsTaken => _steps.Count;

    public void Line(string text) => AnsiConsole.MarkupLineInterpolated($"[grey]{text}[/]");

    public void WarmStart(int steps, double expected, TimeSpan elapsed)
    {
        Line(string.Create(CultureInfo.InvariantCulture,
            $"warm start: {steps} supervised steps, expected reward {expected:f3}, {elapsed.TotalSeconds:f0} s since start"));
    }

    public void HeldOut(int step, double accuracy)
    {
        _heldOut.Add((step, accuracy));
        Line(string.Create(CultureInfo.InvariantCulture, $"held-out accuracy (greedy) after {step} steps: {accuracy:p1}"));
        if (step == 0)
            AnsiConsole.MarkupLine("[bold]step reward               KL  |dlogp|   tok/s sample train  push   time[/]");
    }

    public void Step(StepReport step)
    {
        _steps.Add(step);
        int filled = (int)Math.Round(step.Reward * 10);
        string colour = step.Reward switch { < 0.3 => "red", < 0.9 => "yellow", _ => "green" };
        string difference = step.Stats.LogProbDifference <= 1e-3 ? "default" : "bold red";
        // Fits 80 columns, which Spectre also assumes for a pipe. |dlogp|: the engine's log-probabilities against ours.
        AnsiConsole.MarkupLine(string.Create(CultureInfo.InvariantCulture,
            $"{step.Step,4} {step.Reward,6:f3} [{colour}]{new string('█', filled)}[/][grey]{new string('░', 10 - filled)}[/] "
            + $"{step.Stats.Kl,6:f3}  [{difference}]{step.Stats.LogProbDifference,7:0.0e+00}[/] "
            + $"{step.Tokens / step.Sampling.TotalSeconds,7:f0} "
            + $"{step.Sampling.TotalMilliseconds,4:f0}ms {step.Training.TotalMilliseconds,4:f0}ms {step.Update.TotalMilliseconds,3:f0}ms "
            + $"{step.Elapsed.TotalSeconds,5:f0}s"));
    }

    public void Finish(TimeSpan elapsed)
    {
        (StepReport first, StepReport last) = (_steps[0], _steps[^1]);
        StepReport? reached = Enumerable.Range(0, _steps.Count).Where(i => i >= 4 && _steps.GetRange(i - 4, 5).Average(s => s.Reward) > 0.9)
            .Select(i => (StepReport?)_steps[i]).FirstOrDefault();
        Table table = new Table().Border(TableBorder.Rounded).AddColumn("").AddColumn("before").AddColumn("after");
        table.AddRow("mean reward of a step", Number(first.Reward), Number(_steps.TakeLast(10).Average(s => s.Reward)));
        table.AddRow("held-out accuracy, greedy", Percent(_heldOut[0].Accuracy), Percent(_heldOut[^1].Accuracy));
        table.AddRow("KL from the warm start, nats a token", Number(first.Stats.Kl), Number(last.Stats.Kl));
        table.AddEmptyRow();
        table.AddRow("seed", "", $"{options.Seed}");
        table.AddRow("reward over 0.9 (mean of 5 steps)", "", reached is null ? "[red]not reached[/]"
            : string.Create(CultureInfo.InvariantCulture, $"step {reached.Step}, {reached.Elapsed.TotalSeconds:f0} s"));
        table.AddRow("steps, and time in all", "",
            string.Create(CultureInfo.InvariantCulture, $"{last.Step}, {elapsed.TotalSeconds:f0} s"));
        table.AddRow("of which sampling, training, update", "", string.Create(CultureInfo.InvariantCulture,
            $"{Seconds(s => s.Sampling):f0} s, {Seconds(s => s.Training):f0} s, {Seconds(s => s.Update):f1} s"));
        table.AddRow("tokens sampled", "", _steps.Sum(s => s.Tokens).ToString("n0", CultureInfo.InvariantCulture));
        table.AddRow("largest |dlogp|, engine to trainer", "",
            _steps.Max(s => s.Stats.LogProbDifference).ToString("0.0e+00", CultureInfo.InvariantCulture));
        AnsiConsole.Write(table);

        double Seconds(Func<StepReport, TimeSpan> part) => _steps.Sum(s => part(s).TotalSeconds);
        static string Number(double value) => value.ToString("f3", CultureInfo.InvariantCulture);
        static string Percent(double value) => value.ToString("p1", CultureInfo.InvariantCulture);
    }

    /// <summary>Draws the learning curve.</summary>
    public void Plot(string path)
    {
        LearningCurve.Save(path, options.Seed, _steps, _heldOut);
        Line($"learning curve: {path}");
    }
}
